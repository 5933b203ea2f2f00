"""A snapshot's memory is the paused machine's, byte for byte."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from vm_helpers import ram_pages, sh
from whole_ram import PAGE, before_resume, branch_and_look, differing, read_ram, reconstruct

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.store.memory.dirty import dirty_pages
from ratoon.units import MIB

WORKLOAD = """python3 -c '
import mmap, os, random
choose = random.Random({seed})
with open("/dev/shm/random", "a+b") as file:
    file.truncate(24 << 20)
    ram = mmap.mmap(file.fileno(), 24 << 20)
    for _ in range(4000):
        at = choose.randrange(6144) * 4096
        kind = choose.choice(("new", "byte", "zero", "same"))
        page = ram[at : at + 4096]
        if kind == "new":
            page = choose.randbytes(4096)
        elif kind == "byte":
            page = page[:99] + choose.randbytes(1) + page[100:]
        elif kind == "zero":
            page = bytes(4096)
        ram[at : at + 4096] = page
if choose.random() < 0.5:
    os.truncate("/dev/shm/random", 12 << 20)
'"""


@contextmanager
def swap_file(path: Path, size: int) -> Iterator[None]:
    """Swap space for as long as the block lasts; skips the test where the host allows none."""
    path.touch(mode=0o600)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    subprocess.run(["mkswap", path], check=True, capture_output=True)
    done = subprocess.run(["swapon", path], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no swap here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["swapoff", path], check=True)


def page_out(pid: int, address: int, length: int) -> None:
    """Have the kernel swap out what it can of another process's memory (process_madvise(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    vector = (ctypes.c_uint64 * 2)(address, length)
    pidfd = os.pidfd_open(pid)
    try:
        advised = libc.syscall(
            *(ctypes.c_long(440), pidfd, ctypes.byref(vector), ctypes.c_ulong(1)),
            *(21, ctypes.c_ulong(0)),  # MADV_PAGEOUT
        )
    finally:
        os.close(pidfd)
    assert advised > 0, os.strerror(ctypes.get_errno())


def count_swapped(pid: int, address: int, length: int) -> int:
    with Path(f"/proc/{pid}/pagemap").open("rb") as pagemap:
        pagemap.seek(address // PAGE * 8)
        entries = np.frombuffer(pagemap.read(length // PAGE * 8), np.uint64)
    return int(np.count_nonzero(entries & np.uint64(1 << 62)))


async def test_layers_give_the_memory_of_the_paused_machine(
    engine: Engine, sandbox: Sandbox
) -> None:
    await sh(
        sandbox, "head -c 20000000 /dev/urandom >/dev/shm/a; head -c 9000000 /dev/zero >/tmp/0"
    )
    ram, one = await branch_and_look(engine, sandbox, "one")
    assert differing(ram, reconstruct(one)) == []

    # Freed, overwritten and new pages; a fork of a head without an image, patched at its start.
    async with await engine.fork_one("one") as fork:
        script = "rm /dev/shm/a; head -c 4000000 /dev/urandom >/tmp/0; seq 100000 >/root/b"
        await sh(fork, script)
        ram, two = await branch_and_look(engine, fork, "two")
        assert differing(ram, reconstruct(two)) == []
        ram, three = await branch_and_look(engine, fork, "three")
        assert differing(ram, reconstruct(three)) == []
    assert [snapshot.depth for snapshot in (one, two, three)] == [1, 2, 3]


async def test_an_image_is_what_its_layers_give(engine: Engine, sandbox: Sandbox) -> None:
    await sh(sandbox, "head -c 5000000 /dev/urandom >/dev/shm/c")
    snapshot = (await engine.branch(sandbox, "imaged")).snapshot
    forks = await engine.fork("imaged", 2)  # a burst has the image made
    ram = reconstruct(snapshot)
    for fork in forks:
        assert isinstance(fork, Sandbox)
        assert fork.memory.path.stem == snapshot.manifest.memory_root
        await fork.kill()
    image = engine.images.find(snapshot.manifest.memory_root, ram_pages(snapshot))
    assert image is not None
    assert differing(np.fromfile(image, np.uint8).reshape(-1, PAGE), ram) == []
    assert image.stat().st_mode & 0o777 == 0o444
    assert image.stat().st_blocks * 512 < ram.nbytes / 2, "zeros are holes"


async def test_a_fork_starts_with_the_memory_of_its_snapshot(
    engine: Engine, sandbox: Sandbox
) -> None:
    """Right before it is resumed for the first time, patched and with an image alike."""
    await sh(sandbox, f"head -c {2 * MIB} /dev/urandom >/dev/shm/d")
    snapshot = (await engine.branch(sandbox, "exact")).snapshot
    expected = reconstruct(snapshot)
    for burst in (False, True):
        found: list[list[int]] = []

        def compare(pid: int, found: list[list[int]] = found) -> None:
            found.append(differing(read_ram(pid), expected))

        with before_resume(compare):
            forks = await engine.fork("exact", 2 if burst else 1)
        for fork in forks:
            assert isinstance(fork, Sandbox)
            assert (fork.memory.path.stem == snapshot.manifest.memory_root) == burst
            await fork.kill()
        assert found == [[]] * len(forks)


@pytest.mark.parametrize("seed", range(3))
async def test_a_random_workload_is_captured_whole(engine: Engine, seed: int) -> None:
    """Pages written, rewritten as they were, zeroed and freed, over three branches of one fork."""
    async with await engine.fork_one("base") as sandbox:
        for number in range(3):
            tag = f"random-{number}"
            await sh(sandbox, WORKLOAD.format(seed=10 * seed + number))
            ram, snapshot = await branch_and_look(engine, sandbox, tag)
            assert differing(ram, reconstruct(snapshot)) == [], f"seed {seed}, branch {number}"


async def test_swapped_pages_are_captured(engine: Engine, tmp_path: Path) -> None:
    async with await engine.fork_one("base") as sandbox:
        await sh(sandbox, f"head -c {16 * MIB} /dev/urandom >/dev/shm/swapped")
        address = sandbox.memory.address_in(sandbox.pid)
        with swap_file(tmp_path / "swap", 256 * MIB):
            page_out(sandbox.pid, address, sandbox.memory.length)
            swapped = count_swapped(sandbox.pid, address, sandbox.memory.length)
            assert swapped >= 16 * MIB // PAGE, "the pages were not swapped out"
            length = sandbox.memory.length
            await sandbox.incarnation.machine.pause()  # a guest that runs dirties pages in between
            listed = [
                dirty_pages(sandbox.pid, address, length, method).tolist()
                for method in ("scan", "pagemap")
            ]
            await sandbox.incarnation.machine.resume()
            assert listed[0] == listed[1]
            ram, snapshot = await branch_and_look(engine, sandbox, "swapped")
        assert differing(ram, reconstruct(snapshot)) == []
