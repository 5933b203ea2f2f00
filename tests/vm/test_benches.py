"""Benches on real machines, as small as can be: what they find is what their files say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from vm_helpers import leaves_nothing, link

from ratoon.bench import exec as exec_bench
from ratoon.bench.bench import Settings, Workshop, run
from ratoon.bench.peers import Peers
from ratoon.bench.samples import Samples, write_rows
from ratoon.bench.served import served
from ratoon.bench.textbook import Textbook
from ratoon.bench.virsh import Domain, Virsh
from ratoon.engine.sandbox.engine import DISK_BYTES, Engine
from ratoon.engine.sources.resolve import resolve, root_disk
from ratoon.errors import AlreadyExists, NotFound, RatoonError
from ratoon.machine.vmm.driver import Hardware
from ratoon.store.memory.image import ImageStore
from ratoon.store.snapshot.links import ram_pages, read_links


def workshop(engine: Engine, room: Path, *, skip_build: bool = False) -> Workshop:
    settings = Settings(room, base_tag="base", skip_build=skip_build)
    return Workshop(engine, 2, settings, lambda message: None, room)


async def test_a_bench_and_its_files(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exec_bench, "STREAM_MIB", 1)
    monkeypatch.setattr(exec_bench, "STREAM_ROUNDS", 1)
    samples = await exec_bench.BENCH.measure(workshop(engine, tmp_path))
    assert len(samples["exec"]) == 2 * len(exec_bench.TRIPS)
    assert len(samples["exec-streams"]) == len(exec_bench.STREAMS)
    for name, rows in samples.items():
        write_rows(tmp_path / f"{name}.csv", rows)
    read = exec_bench.BENCH.read(tmp_path)
    assert exec_bench.BENCH.tables(read) == exec_bench.BENCH.tables(samples)
    assert engine.sandboxes == ()


async def test_a_fork_of_what_the_textbook_assembled(engine: Engine, tmp_path: Path) -> None:
    """It runs, over HTTP as in the bench, and its memory is really what was assembled."""
    await link(engine, "base", "linked", "echo 42 >/dev/shm/answer")
    snapshot = engine.store.get("linked")
    textbook = Textbook(tmp_path)
    textbook.write(read_links(snapshot), ram_pages(snapshot))
    async with served(engine) as api:
        with textbook.forks_of(engine):
            forked = (await api.fork("linked")).body
        assert textbook.last
        assert textbook.last.hash_ms > 0
        mapped = Path(f"/proc/{forked['pid']}/maps").read_text()
        assert "/memory (deleted)" in mapped
        assert not [*tmp_path.glob("assembled*")]
        said = await api.exec(forked["id"], ["cat", "/dev/shm/answer"])
        assert said.body["stdout"] == "42\n"
        await api.kill(forked["id"])
        with pytest.raises(NotFound, match="no sandbox"):
            await api.exec(forked["id"], ["true"])
    assert "open" not in vars(engine.images)  # the store's own again
    assert isinstance(engine.images, ImageStore)


async def test_what_is_there_is_taken_or_refused(engine: Engine, tmp_path: Path) -> None:
    shop = workshop(engine, tmp_path)
    assert await shop.base() == "base"
    assert await shop.link("base", "bench-1", ["true"])
    assert await shop.link("base", "bench-1", ["true"]) is None
    with pytest.raises(AlreadyExists, match="skip-build"):
        await workshop(engine, tmp_path).link("base", "bench-1", ["true"])
    again = workshop(engine, tmp_path, skip_build=True)
    assert await again.link("base", "bench-1", ["true"]) is None
    with pytest.raises(NotFound, match="skip-build"):
        await again.link("base", "bench-2", ["true"])


async def test_what_libvirt_saved_comes_back(engine: Engine, tmp_path: Path) -> None:
    """Twice the same, from a disk that the first one wrote to."""
    disk = root_disk(resolve("debian"), DISK_BYTES)
    machine = engine.store.get("base").manifest.machine
    hardware = Hardware(machine.ram_bytes, 1, machine.accelerator, machine.cpu)
    peers = Peers(tmp_path, hardware, disk)
    with leaves_nothing(engine):
        async with Virsh.running(tmp_path / "libvirt") as virsh:
            domain = Domain(virsh, peers.boot(tmp_path / "domain.qcow2"))
            async with domain.booted() as guest:
                await guest.exec(["sh", "-c", "echo 42 >/dev/shm/answer"])
                await domain.save()
            for _ in range(2):
                domain.make_ready()
                async with domain.restored() as guest:
                    look = ["sh", "-c", "cat /dev/shm/answer; ls /root; touch /root/later; sync"]
                    assert await guest.exec(look) == "42\n"
            with pytest.raises(RatoonError, match=r"virsh restore /none: .*No such file"):
                await virsh.do("restore /none")
    assert not list(Path("/tmp").glob("ratoon-virsh-*"))


async def test_files_go_where_they_are_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also below the current directory; what a bench makes meanwhile is named from the root."""
    monkeypatch.chdir(tmp_path)
    rooms: list[Path] = []

    async def measure(shop: Workshop) -> Samples:
        rooms.append(shop.room)
        return {}

    bench = replace(exec_bench.BENCH, rows={}, measure=measure, targets=lambda samples: [])
    await run(bench, Settings(Path("build/bench")), lambda message: None)
    assert [path.name for path in Path("build/bench").iterdir()] == ["exec.json"]
    assert rooms[0].is_absolute()
    assert not rooms[0].exists()
