"""What the library reads is what the daemon writes, field by field."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest
from pydantic import BaseModel

from ratoon.client import answers
from ratoon.client import files as our_files
from ratoon.client import snapshots as our_snapshots
from ratoon.client.answers import Limits, read, sandbox_info
from ratoon.client.options import Options, request_for
from ratoon.client.snapshots import differences
from ratoon.client.volumes import Volume, VolumeInfo
from ratoon.daemon.models import commands, files, sandboxes, snapshots, store
from ratoon.daemon.models import volumes as models_of_volumes
from ratoon.errors import InvalidInput

PAIRS: list[tuple[type[Any], type[BaseModel]]] = [
    (our_snapshots.SnapshotInfo, snapshots.SnapshotInfo),
    (our_snapshots.SnapshotDetail, snapshots.SnapshotDetail),
    (our_snapshots.LineageNode, store.LineageNode),
    (our_snapshots.ChangedFile, store.ChangedFile),
    (our_snapshots.FileDifferences, store.FileDifferences),
    (our_snapshots.Differences, store.Differences),
    (answers.PoolInfo, store.PoolInfo),
    (answers.Event, sandboxes.EventInfo),
    (answers.PublishedPort, sandboxes.PublishedPort),
    (answers.Limits, sandboxes.LimitsOfSandbox),
    (answers.SandboxInfo, sandboxes.SandboxInfo),
    (Volume, sandboxes.VolumeOfSandbox),
    (VolumeInfo, models_of_volumes.VolumeInfo),
    (answers.ProcessInfo, commands.ProcessInfo),
    (answers.EvalResult, commands.EvalAnswer),
    (our_files.FileInfo, files.FileInfo),
]
#: What other clients want to see, and says nothing here.
FOR_OTHERS = {"netns", "guest_addr", "memory_limit_mib"}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda each: each.__name__)
def test_the_fields_are_the_same(ours: type[Any], theirs: type[BaseModel]) -> None:
    assert {each.name for each in fields(ours)} == theirs.model_fields.keys() - FOR_OTHERS
    for each in fields(ours):
        if each.default is MISSING and each.default_factory is MISSING:
            assert theirs.model_fields[each.name].is_required(), each.name


def test_what_a_newer_daemon_tells_is_passed_over() -> None:
    port = read(answers.PublishedPort, {"guest_port": 1, "host_port": 2, "colour": "green"})
    assert (port.guest_port, port.host_port) == (1, 2)


def test_what_is_within_an_answer_is_read_too() -> None:
    told = {each.name: None for each in fields(answers.SandboxInfo)}
    limits = {"memory_mib": 1, "cpus": None, "pids": None, "disk_mib": None}
    ports, mounts = [{"guest_port": 1, "host_port": 2}], [{"source": "a", "target": "/a"}]
    info = sandbox_info({**told, "limits": limits, "ports": ports, "volumes": mounts})
    assert info.limits == Limits(memory_mib=1)
    assert info.ports == [answers.PublishedPort(1, 2)]
    assert info.volumes == [Volume("a", "/a")]
    told = {each.name: None for each in fields(our_snapshots.Differences)}
    assert differences(told).files is None
    changed = [{"path": "/a", "what": ["mode"]}]
    found = differences({**told, "files": {"added": [], "removed": [], "changed": changed}})
    assert found.files
    assert found.files.changed == [our_snapshots.ChangedFile("/a", ["mode"])]


EVERYTHING: Options = {
    "timeout": 60,
    "idle": 1.5,
    "metadata": {"who": "me"},
    "network": "allow:198.51.100.7:443",
    "memory_mib": 512,
    "cpus": 1.5,
    "pids": 100,
    "disk_mib": 1024,
    "publish": {80: 8080, 443: None},
    "spare": True,
    "volumes": ["/data:/mnt:ro", "cache:/root/.cache"],
}


def test_each_option_is_one_that_the_daemon_takes() -> None:
    assert EVERYTHING.keys() == Options.__annotations__.keys()
    sent = request_for(EVERYTHING)
    taken = sandboxes.ManyForks.model_validate(sent)
    assert taken.model_fields_set == sent.keys() == sandboxes.ManyForks.model_fields.keys() - {"n"}
    assert taken.model_dump(exclude={"n"}) == {
        "network": "allow:198.51.100.7:443",
        "limits": {"memory_mib": 512, "cpus": 1.5, "pids": 100, "disk_mib": 1024},
        "ttl_seconds": 60,
        "idle_seconds": 1.5,
        "spare": True,
        "volumes": [
            {"source": "/data", "target": "/mnt", "read_only": True},
            {"source": "cache", "target": "/root/.cache", "read_only": False},
        ],
        "metadata": {"who": "me"},
        "publish": [
            {"guest_port": 80, "host_port": 8080},
            {"guest_port": 443, "host_port": None},
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
