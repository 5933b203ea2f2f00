"""The starts that are kept: found, missed with the reason, and pruned."""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.startup import key
from ratoon.engine.startup.cache import Damaged, Entry, StartCache, tag_of
from ratoon.engine.startup.key import Booted
from ratoon.engine.startup.prune import prune
from ratoon.errors import Conflict, InvalidInput, NotFound
from ratoon.machine.guest.shared import wire
from ratoon.machine.vmm import command
from small_snapshots import publish

IMAGE = "blake3:1"


@pytest.fixture
async def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engine]:
    monkeypatch.setenv("RATOON_RUNTIME", str(tmp_path / "run"))
    monkeypatch.setattr(key, "qemu_version", lambda: "10.0.2")
    async with Engine.open(tmp_path / "home") as engine:
        yield engine


@pytest.fixture
def cache(engine: Engine) -> StartCache:
    return StartCache(engine.store)


def document(image: str = IMAGE, qemu_version: str = "10.0.2") -> Booted:
    return Booted(
        image=image,
        kernel="k",
        kernel_words=(),
        initramfs="i",
        agent_protocol=wire.VERSION,
        ram_bytes=1 << 20,
        vcpus=1,
        disk_bytes=1 << 20,
        machine=command.MACHINE,
        devices=command.DEVICES,
        qemu_version=qemu_version,
        accelerator="tcg",
        cpu="max",
        host_cpu=None,
    )


def keep(engine: Engine, cache: StartCache, wanted: Booted) -> Entry:
    snapshot = publish(engine.store, tag_of(wanted.key))
    return cache.write(wanted, snapshot, image="debian", pid=None, stages_ms={})


def test_what_was_kept_is_found(engine: Engine, cache: StartCache) -> None:
    with pytest.raises(NotFound, match="nothing of this image was kept"):
        cache.find(document(), "debian")
    entry = keep(engine, cache, document())
    assert cache.find(document(), "debian") == entry
    assert cache.entries() == [entry]
    assert oct(cache.directory.stat().st_mode & 0o777) == "0o700"


def test_a_miss_names_what_differs(engine: Engine, cache: StartCache) -> None:
    keep(engine, cache, document(qemu_version="10.0.1"))
    keep(engine, cache, document("blake3:2", "10.0.1"))
    with pytest.raises(NotFound, match=r"differs: qemu_version is 10.0.1 there, 10.0.2 here$"):
        cache.find(document(), "debian")


def test_a_miss_is_compared_with_starts_of_the_same_image(
    engine: Engine, cache: StartCache
) -> None:
    keep(engine, cache, document("blake3:2"))
    with pytest.raises(NotFound, match=r"^nothing of this image was kept$"):
        cache.find(document(), "python")
    with pytest.raises(NotFound, match=r"differs: image is blake3:2 there, blake3:1 here$"):
        cache.find(document(), "debian")  # the name leads to another one by now
    keep(engine, cache, document(qemu_version="10.0.1"))
    with pytest.raises(NotFound, match=r"differs: qemu_version is 10.0.1 there, 10.0.2 here$"):
        cache.find(document(), "python")  # the same one by another name


def test_a_start_whose_snapshot_is_gone_or_another(engine: Engine, cache: StartCache) -> None:
    entry = keep(engine, cache, document())
    engine.store.delete(entry.snapshot.tag)
    with pytest.raises(NotFound, match=f"its snapshot {entry.snapshot.tag} is gone$"):
        cache.find(document(), "debian")
    publish(engine.store, entry.snapshot.tag)
    with pytest.raises(NotFound, match="another one has its name"):
        cache.find(document(), "debian")


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 2}', b"\xff"])
def test_a_damaged_document_is_a_miss(engine: Engine, cache: StartCache, content: bytes) -> None:
    entry = keep(engine, cache, document())
    (cache.directory / f"{entry.key}.json").write_bytes(content)
    with pytest.raises(NotFound, match="its document is damaged"):
        cache.find(document(), "debian")
    (found,) = cache.everything()
    assert isinstance(found, Damaged)


def test_a_document_that_was_edited_is_a_miss(engine: Engine, cache: StartCache) -> None:
    entry = keep(engine, cache, document())
    path = cache.directory / f"{entry.key}.json"
    path.write_text(path.read_text().replace("10.0.2", "11.0.0"))
    with pytest.raises(NotFound, match="not what its key says"):
        cache.find(document(), "debian")


def test_starts_are_named_by_the_beginning_of_their_keys(engine: Engine, cache: StartCache) -> None:
    entry = keep(engine, cache, document())
    for name in (entry.key, entry.key[:5], entry.snapshot.tag):
        assert cache.named(name) == entry
    for name, error in (("../x", InvalidInput), ("", InvalidInput), ("0" * 64, NotFound)):
        with pytest.raises(error):
            cache.named(name)
    for number in range(16):
        keep(engine, cache, document(f"blake3:{number + 10}"))
    first = {each.key[0] for each in cache.entries()}
    assert len(first) < 17
    (twice,) = [
        digit
        for digit in sorted(first)
        if sum(each.key.startswith(digit) for each in cache.entries()) > 1
    ][:1]
    with pytest.raises(Conflict, match="use more digits"):
        cache.named(twice)


async def test_one_at_a_time_makes_a_start(cache: StartCache) -> None:
    async with cache.making(1, "ab12"):
        assert cache.try_making(1, "ab12") is None
        other = cache.try_making(2, "ab12")
        assert other is not None
        os.close(other)
    lock = cache.try_making(1, "ab12")
    assert lock is not None
    os.close(lock)


async def test_pruning_takes_what_no_run_can_use(engine: Engine, cache: StartCache) -> None:
    good = keep(engine, cache, document())
    old = keep(engine, cache, document(qemu_version="10.0.1"))
    gone = keep(engine, cache, document("blake3:3"))
    engine.store.delete(gone.snapshot.tag)
    publish(engine.store, "start-" + "0" * 24)
    publish(engine.store, "start-up")  # somebody's own
    would = await prune(engine, cache, dry_run=True)
    assert len(cache.everything()) == 3
    done = await prune(engine, cache)
    assert [each.key for each in would] == [each.key for each in done]
    assert {each.key for each in done} == {old.key, gone.key, "0" * 24}
    assert cache.entries() == [good]
    left = {path.name for path in engine.store.snapshots.iterdir()}
    assert left == {good.snapshot.tag, "start-up"}


async def test_pruning_says_how_short_a_time_was(engine: Engine, cache: StartCache) -> None:
    start = keep(engine, cache, document())
    before = time.time() - 20
    os.utime(cache.directory / f"{start.key}.json", (before, before))
    (told,) = await prune(engine, cache, older_than=10, dry_run=True)
    assert re.fullmatch(r"it was not used for 0:\d\d:\d\d", told.why)
    assert not told.why.endswith("0:00:00")


async def test_pruning_by_age_and_all(engine: Engine, cache: StartCache) -> None:
    used, unused = keep(engine, cache, document()), keep(engine, cache, document("blake3:2"))
    os.utime(cache.directory / f"{unused.key}.json", (1000, 1000))
    os.utime(cache.directory / f"{used.key}.json", (1000, 1000))
    cache.touch(used)
    assert [each.key for each in await prune(engine, cache, older_than=3600)] == [unused.key]
    assert [each.key for each in await prune(engine, cache, everything=True)] == [used.key]
    assert await prune(engine, cache, everything=True) == []


async def test_what_is_being_made_is_not_pruned(engine: Engine, cache: StartCache) -> None:
    entry = keep(engine, cache, document())
    async with cache.making(1, entry.key):
        assert await prune(engine, cache, everything=True) == []
    assert cache.entries() == [entry]
