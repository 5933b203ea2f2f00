"""Benches on real machines, as small as can be: what they find is what their files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratoon.bench import exec as exec_bench
from ratoon.bench.bench import Settings, Workshop
from ratoon.bench.samples import write_rows
from ratoon.bench.served import served
from ratoon.bench.textbook import Textbook
from ratoon.errors import AlreadyExists, NotFound
from ratoon.memory.image import ImageStore
from ratoon.sandbox.engine import Engine
from ratoon.snapshot.links import ram_pages, read_links


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
    await engine.snapshot_diff("base", "linked", ["sh", "-c", "echo 42 >/dev/shm/answer"])
    snapshot = engine.store.get("linked")
    textbook = Textbook(tmp_path)
    textbook.write(read_links(snapshot), ram_pages(snapshot))
    async with served(engine) as api:
        with textbook.forks_of(engine):
            forked = (await api.fork("linked")).body
        assert textbook.last
        assert textbook.last.hash_ms > 0
        mapped = Path(f"/proc/{forked['pid']}/maps").read_text()
        assert f"{tmp_path}/assembled (deleted)" in mapped
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
