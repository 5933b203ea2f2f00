"""All of a machine's RAM, and what a snapshot's layers give, by a path of its own.

The machine's RAM is read through /proc/PID/mem, and the layers by the format's description alone:
a reader that shares nothing with `ratoon.store.memory`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from numpy.typing import NDArray
from vm_helpers import ram_pages

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.vmm.qemu import QemuMachine
from ratoon.store.snapshot.snapshot import Snapshot

PAGE = 4096
Ram = NDArray[np.uint8]


def read_layer(path: Path) -> tuple[NDArray[np.uint64], Ram]:
    """Page numbers and pages of a page-set file; every digest is checked."""
    raw = path.read_bytes()
    magic, version, page_size, _, entries, stored = struct.unpack_from("<8sIIQQQ", raw)
    assert (magic, version, page_size) == (b"RATOONPS", 2, PAGE)
    data, end = PAGE, PAGE + PAGE * stored
    numbers = np.frombuffer(raw, "<u8", entries, end)
    at = end + 8 * entries
    pages = np.zeros((entries, PAGE), np.uint8)
    empty = blake3(bytes(PAGE)).digest()
    for entry in range(entries):
        digest = raw[at + 32 * entry : at + 32 * entry + 32]
        if digest != empty:
            content = raw[data : data + PAGE]
            assert blake3(content).digest() == digest
            pages[entry] = np.frombuffer(content, np.uint8)
            data += PAGE
    assert (data, at + 32 * entries) == (end, len(raw))
    return numbers, pages


def reconstruct(snapshot: Snapshot) -> Ram:
    ram = np.zeros((ram_pages(snapshot), PAGE), np.uint8)
    for layer in range(snapshot.depth + 1):
        numbers, pages = read_layer(snapshot.memory_path(layer))
        ram[numbers.astype(np.int64)] = pages
    return ram


def read_ram(pid: int) -> Ram:
    """All of a machine's RAM, from the mapping of the image that it was started on."""
    (line,) = (
        line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/memory" in line
    )
    span, permissions, offset = line.split()[:3]
    assert permissions == "rw-p"
    assert int(offset, 16) == 0
    start, end = (int(address, 16) for address in span.split("-"))
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(start)
        ram = np.frombuffer(bytearray(end - start), np.uint8)
        done = 0
        while done < len(ram):
            done += memory.readinto(ram[done:].data) or 0
    return ram.reshape(-1, PAGE)


def differing(left: Ram, right: Ram) -> list[int]:
    assert left.shape == right.shape
    words = left.view(np.uint64) != right.view(np.uint64)
    return np.flatnonzero(words.any(axis=1)).tolist()


@contextmanager
def before_resume(look: Callable[[int], None]) -> Iterator[None]:
    """Have `look(pid)` called where a machine that stands still is about to be resumed."""
    resume = QemuMachine.resume

    async def look_first(machine: QemuMachine) -> None:
        look(machine.pid)
        await resume(machine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QemuMachine, "resume", look_first)
        yield


async def branch_and_look(engine: Engine, sandbox: Sandbox, tag: str) -> tuple[Ram, Snapshot]:
    """Branch; also the RAM as it was in the pause."""
    seen: list[Ram] = []
    with before_resume(lambda pid: seen.append(read_ram(pid))):
        branched = await engine.branch(sandbox, tag)
    (ram,) = seen
    return ram, branched.snapshot
