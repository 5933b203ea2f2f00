"""What a sandbox may be started with, and how a request says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypedDict

from ratoon.api.answers import IdleCounts, Limits
from ratoon.errors import InvalidInput

#: A port of the daemon's host, None for any; of its loopback, or of an address.
Place = int | None | tuple[str, int | None]


class Options(TypedDict, total=False):
    """What a new sandbox gets besides its snapshot; all of it may be left out.

    `timeout`: seconds after its fork until it is killed. `idle`: seconds without use until it goes
    to standby, from which it wakes when it is used. `idle_counts`: what is use besides calls:
    `activity`, what it uses of the processor and the network itself; `commands`, any that runs; or
    `calls`, nothing. `metadata`: what to find it by.

    `network`: `none`, `outbound` or `allow:CIDR:PORT,…`; left out, what its snapshot says.
    `memory_mib`, `cpus` (1.5 is one and a half), `pids` and `disk_mib`: what it may use of its
    host. `publish`: ports of the guest, and for each a port of the loopback of the daemon's host
    that leads there, or None for any that is free; or `(ADDRESS, PORT)` for another address of the
    host; or several of these in a list. `spare`: a machine is kept started for its next reset.
    `auto_remove`: it is killed once the command has ended that it was made for. `stop_signal`:
    what `stop` ends that with (`SIGINT`, `INT` or `2`); left out, what its image says, or SIGTERM.
    `env`, `user` (NAME or UID, also with `:GROUP`) and `workdir`, which is made: what commands in
    it have that do not say otherwise; left out, what its snapshot or image says, to whose
    environment `env` is added.
    `volumes`: each as `SOURCE:TARGET[:ro]`, where SOURCE is the real path of a directory of the
    daemon's host or the name of a volume, and TARGET where it is mounted in the guest.
    """

    timeout: float | None
    idle: float | None
    idle_counts: IdleCounts
    metadata: Mapping[str, str]
    network: str | None
    memory_mib: int | None
    cpus: float | None
    pids: int | None
    disk_mib: int | None
    publish: Mapping[int, Place | list[Place]]
    spare: bool
    auto_remove: bool
    stop_signal: str | None
    env: Mapping[str, str]
    user: str | None
    workdir: str | None
    volumes: Sequence[str]


_LIMITS = ("memory_mib", "cpus", "pids", "disk_mib")
_NAMES = {
    **{name: name for name in ("idle_counts", "network", "spare", "auto_remove", "stop_signal")},
    **{name: name for name in ("user", "workdir")},
    **{"timeout": "ttl_seconds", "idle": "idle_seconds"},
}


def request_for(options: Options, limits: Limits | None = None) -> dict[str, Any]:
    """The fields of a request; of limits, those that are not given are those of `limits`."""
    given: dict[str, Any] = {**options}
    if unknown := given.keys() - Options.__annotations__.keys():
        raise TypeError(f"sandboxes have no option {', '.join(sorted(unknown))}")
    body = {wire: given[name] for name, wire in _NAMES.items() if name in given}
    if own := {name: given[name] for name in _LIMITS if name in given}:
        body["limits"] = {**asdict(limits or Limits()), **own}
    body |= {name: dict(given[name] or {}) for name in ("env", "metadata") if name in given}
    if "publish" in given:
        body["publish"] = [
            _published(guest, place)
            for guest, places in given["publish"].items()
            for place in (places if isinstance(places, list) else [places])
        ]
    if "volumes" in given:
        body["volumes"] = [_volume(each) for each in given["volumes"]]
    return body


def _published(guest: int, place: Place) -> dict[str, Any]:
    address, host = place if isinstance(place, tuple) else (None, place)
    return {"guest_port": guest, "host_port": host, "address": address}


def _volume(text: str) -> dict[str, Any]:
    """`SOURCE:TARGET` or `SOURCE:TARGET:ro` as a request has it; InvalidInput."""
    source, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    if not source or not target or mode not in ("", "ro", "rw"):
        raise InvalidInput(f"{text!r}: write SOURCE:TARGET or SOURCE:TARGET:ro")
    return {"source": source, "target": target, "read_only": mode == "ro"}
