"""How the library reads what a daemon answers, and how it says options."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel, TypeAdapter

from ratoon import api
from ratoon.api import files
from ratoon.api.answers import EvalResult, Limits, PublishedPort, SandboxInfo, read
from ratoon.client.options import Options, request_for
from ratoon.daemon import forkd
from ratoon.daemon.models import commands, sandboxes
from ratoon.daemon.models import files as models_of_files
from ratoon.errors import InvalidInput

MODULES = [
    importlib.import_module(f"{api.__name__}.{each.name}")
    for each in pkgutil.iter_modules(api.__path__)
]
ANSWERS = [
    each
    for module in MODULES
    for each in vars(module).values()
    if isinstance(each, type) and is_dataclass(each) and each.__module__ == module.__name__
]
#: Of these the daemon has its own, which say more, or say it in another way.
OF_THE_DAEMON: dict[type[Any], type[Any]] = {
    SandboxInfo: forkd.SandboxInfo,
    EvalResult: commands.EvalAnswer,
    files.FileInfo: models_of_files.FileInfo,
}
VALUES: dict[object, object] = {str: "text", int: 0o644, float: 0.5, bool: True, Any: [None]}


def made_up(kind: Any) -> Any:
    """One that has all there can be."""
    if is_dataclass(kind):
        types = get_type_hints(kind)
        made = {each.name: made_up(types[each.name]) for each in fields(kind)}
        return kind(**made)  # type: ignore[operator]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        types = get_type_hints(kind)
        return kind(**{name: made_up(types[name]) for name in kind.model_fields})
    of, arguments = get_origin(kind), get_args(kind)
    if of is Literal:
        return arguments[-1]
    if of in (Union, UnionType):
        return made_up(arguments[0])
    if of is list:
        return [made_up(arguments[0])] * 2
    if of is dict:
        return {"name": made_up(arguments[1])}
    return VALUES[kind]


@pytest.mark.parametrize("kind", ANSWERS, ids=lambda each: each.__name__)
def test_what_the_daemon_writes_is_read(kind: type[Any]) -> None:
    told = made_up(kind)
    theirs = made_up(OF_THE_DAEMON.get(kind, kind))
    written = TypeAdapter[Any](type(theirs)).dump_python(theirs, mode="json")
    assert read(kind, written) == told
    newer = {**written, "colour": "green"}
    assert read(list[kind], [newer, newer]) == [told, told]  # type: ignore[valid-type]


def test_a_mode_is_in_octal() -> None:
    theirs = made_up(models_of_files.FileInfo)
    written = TypeAdapter(models_of_files.FileInfo).dump_python(theirs, mode="json")
    assert (written["mode"], read(files.FileInfo, written).mode) == ("0644", 0o644)


def test_what_need_not_be_there() -> None:
    port = {"guest_port": 1, "host_port": 2}
    with pytest.raises(TypeError, match="host_port"):
        read(PublishedPort, {"guest_port": 1})
    assert read(PublishedPort, {**port, "colour": "green"}) == PublishedPort(1, 2, "127.0.0.1")
    assert read(Limits, {"pids": 3}) == Limits(pids=3)
    told = {each.name: None for each in fields(SandboxInfo)}
    assert read(SandboxInfo, {**told, "limits": {}, "ports": [port]}).ports == [PublishedPort(1, 2)]


EVERYTHING: Options = {
    "timeout": 60,
    "idle": 1.5,
    "idle_counts": "commands",
    "metadata": {"who": "me"},
    "network": "allow:198.51.100.7:443",
    "memory_mib": 512,
    "cpus": 1.5,
    "pids": 100,
    "disk_mib": 1024,
    "publish": {80: 8080, 443: [None, ("::1", 8443)]},
    "spare": True,
    "auto_remove": True,
    "stop_signal": "SIGINT",
    "env": {"A": "1"},
    "user": "nobody",
    "workdir": "/srv",
    "volumes": ["/data:/mnt:ro", "cache:/root/.cache"],
}


def test_each_option_is_one_that_the_daemon_takes() -> None:
    assert EVERYTHING.keys() == Options.__annotations__.keys()
    sent, tcp = request_for(EVERYTHING), {"protocol": "tcp"}
    taken = sandboxes.ManyForks.model_validate(sent)
    assert taken.model_fields_set == sent.keys() == sandboxes.ManyForks.model_fields.keys() - {"n"}
    assert taken.model_dump(exclude={"n"}) == {
        "network": "allow:198.51.100.7:443",
        "limits": {"memory_mib": 512, "cpus": 1.5, "pids": 100, "disk_mib": 1024},
        "ttl_seconds": 60,
        "idle_seconds": 1.5,
        "idle_counts": "commands",
        "spare": True,
        "auto_remove": True,
        "stop_signal": "SIGINT",
        "env": {"A": "1"},
        "user": "nobody",
        "workdir": "/srv",
        "volumes": [
            {"source": "/data", "target": "/mnt", "read_only": True},
            {"source": "cache", "target": "/root/.cache", "read_only": False},
        ],
        "metadata": {"who": "me"},
        "publish": [
            {"guest_port": 80, "host_port": 8080, "address": None, **tcp},
            {"guest_port": 443, "host_port": None, "address": None, **tcp},
            {"guest_port": 443, "host_port": 8443, "address": "::1", **tcp},
        ],
    }


def test_what_is_not_given_is_not_said() -> None:
    assert request_for({}) == {}
    assert request_for({"timeout": None}) == {"ttl_seconds": None}


def test_a_limit_is_added_to_those_there_are() -> None:
    sent = request_for({"cpus": 2}, Limits(memory_mib=512, cpus=1))
    assert sent == {"limits": {"memory_mib": 512, "cpus": 2, "pids": None, "disk_mib": None}}


@pytest.mark.parametrize("text", ["", "a", "a:", ":/b", "/a:/b:rx", "/a:/b:ro:ro"])
def test_what_is_no_volume(text: str) -> None:
    with pytest.raises(InvalidInput, match="SOURCE:TARGET"):
        request_for({"volumes": [text]})


def test_an_option_that_does_not_exist() -> None:
    with pytest.raises(TypeError, match="memory_gib"):
        request_for({"memory_gib": 1})  # type: ignore[typeddict-unknown-key]
