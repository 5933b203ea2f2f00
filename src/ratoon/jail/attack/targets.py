"""What the process that is stood in for was given, and what others have on the host."""

from __future__ import annotations

import os
from typing import Any


def as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


class Targets:
    """What the honest process was given, and what others have on the host."""

    def __init__(self) -> None:
        self.take({})

    def take(self, given: dict[str, Any]) -> None:
        """Have these from now on."""
        own = given.get("own") or {}
        self.memory: str | None = own.get("memory")
        self.layers: list[int] = as_list(own.get("layers"))
        self.overlay: list[int] = as_list(own.get("overlay"))
        self.traces: list[int] = as_list(own.get("console")) + as_list(own.get("log"))
        self.writable: list[int] = self.overlay + self.traces
        self.sockets: dict[str, int] = own.get("sockets") or {}
        self.host_paths: list[str] = as_list(given.get("host_paths"))
        self.unix_sockets: list[str] = as_list(given.get("unix_sockets"))
        self.abstract: list[str] = as_list(given.get("abstract"))
        self.pids: list[int] = [int(pid) for pid in as_list(given.get("pids"))]
        self.tcp: list[tuple[str, int]] = [(h, int(p)) for h, p in as_list(given.get("tcp"))]
        self.udp: list[tuple[str, int]] = [(h, int(p)) for h, p in as_list(given.get("udp"))]
        self.neighbour_uid: int | None = given.get("uid_of_neighbour")
        self.only: list[str] = as_list(given.get("only"))
        self.skip: list[str] = as_list(given.get("skip"))
        self.in_process: bool = bool(given.get("in_process"))

    def held(self) -> list[int]:
        return self.layers + self.writable + list(self.sockets.values())


T = Targets()
MAIN_PID = os.getpid()
MAIN_PARENT = os.getppid()
AT_START: list[int] = []  # descriptors that were open before this module opened any
