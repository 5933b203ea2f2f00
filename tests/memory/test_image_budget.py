"""Images under a byte budget: who goes, who stays, and that nobody who uses one is disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from memory_helpers import RAM, Layer, guest_on, ram_of, write_chain
from ratoon.errors import InvalidInput
from ratoon.files import locked
from ratoon.store.memory.budget import VARIABLE, CachedImage, evictable, image_budget
from ratoon.store.memory.cache import OpenImage
from ratoon.store.memory.chain import Link
from ratoon.store.memory.image import ImageStore
from ratoon.store.memory.page import PAGE_SIZE

#: Three memories, of 4, 3 and 2 pages.
MEMORIES: list[Layer] = [{1: 1, 2: 2, 3: 3, 9: 4}, {2: 1, 5: 2, 6: 3}, {60: 5, 62: 6}]


@pytest.fixture
def chains(tmp_path: Path) -> list[list[Link]]:
    """For each memory, the chain of one layer."""
    found = []
    for number, layer in enumerate(MEMORIES):
        directory = tmp_path / f"chain{number}"
        directory.mkdir()
        found.append(write_chain(directory, [layer]))
    return found


def store_for(tmp_path: Path, pages: int) -> ImageStore:
    return ImageStore(tmp_path / "images", budget=pages * PAGE_SIZE)


def root_of(chain: list[Link]) -> str:
    return chain[-1].root


def used_at(store: ImageStore, chain: list[Link], seconds: int) -> None:
    """Have the image of `chain` look as if it was last used then."""
    os.utime(store.directory / f"{root_of(chain)}.json", (seconds, seconds))


def present(store: ImageStore, chains: list[list[Link]]) -> list[int]:
    """Which of the chains have an image."""
    return [n for n, chain in enumerate(chains) if store.find(root_of(chain), RAM)]


def open_files() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir())


def opened(store: ImageStore, chain: list[Link]) -> OpenImage:
    image = store.open(root_of(chain), RAM)
    assert image is not None
    return image


# Sizes ----------------------------------------------------------------------------------------


def test_the_default_is_a_quarter_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    status = os.statvfs(tmp_path)
    assert image_budget(tmp_path) == status.f_blocks * status.f_frsize // 4
    assert ImageStore(tmp_path).budget == image_budget(tmp_path)


def test_the_environment_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "3G")
    assert ImageStore(tmp_path).budget == 3 << 30
    assert ImageStore(tmp_path, budget=7).budget == 7
    monkeypatch.setenv(VARIABLE, "plenty")
    with pytest.raises(InvalidInput, match="RATOON_IMAGE_BUDGET: 'plenty' is not a size"):
        ImageStore(tmp_path)


# Who goes -------------------------------------------------------------------------------------


def test_the_order_of_leaving() -> None:
    young, old, free, kept = (
        CachedImage("young", 10, 9),
        CachedImage("old", 10, 2),
        CachedImage("free", 0, 1),
        CachedImage("kept", 10, 0),
    )
    assert evictable([young, old, free, kept], keep="kept") == [old, young]


def test_what_the_budget_holds_stays(tmp_path: Path, chains: list[list[Link]]) -> None:
    store = store_for(tmp_path, 4 + 3 + 2)
    for chain in chains:
        store.make(chain, RAM)
    assert present(store, chains) == [0, 1, 2]


@pytest.mark.parametrize(
    ("pages", "left"), [(8, [1, 2]), (5, [1, 2]), (4, [2]), (2, [2]), (1, [2]), (0, [2])]
)
def test_the_least_recently_used_go_and_no_more_of_them(
    tmp_path: Path, chains: list[list[Link]], pages: int, left: list[int]
) -> None:
    store = store_for(tmp_path, 9)
    for number, chain in enumerate(chains[:2]):
        store.make(chain, RAM)
        used_at(store, chain, 1000 + number)
    store.budget = pages * PAGE_SIZE
    store.make(chains[2], RAM)
    assert present(store, chains) == left
    names = {path.stem for path in store.directory.iterdir() if path.name[0] != "."}
    assert names == {root_of(chains[number]) for number in left}


def test_a_fork_counts_as_a_use_and_a_look_does_not(
    tmp_path: Path, chains: list[list[Link]]
) -> None:
    store = store_for(tmp_path, 6)
    for number, chain in enumerate(chains[:2]):
        store.budget = 9 * PAGE_SIZE
        store.make(chain, RAM)
        used_at(store, chain, 1000 + number)
    store.find(root_of(chains[1]), RAM)
    opened(store, chains[0]).close()
    assert present(store, chains) == [0, 1]
    store.budget = 6 * PAGE_SIZE
    store.make(chains[2], RAM)
    assert present(store, chains) == [0, 2]


def test_an_image_made_long_ago_and_used_since_is_still_the_one_that_was_stamped(
    tmp_path: Path, chains: list[list[Link]]
) -> None:
    store = store_for(tmp_path, 9)
    path = store.make(chains[0], RAM)
    before = path.stat()
    used_at(store, chains[0], 1000)
    opened(store, chains[0]).close()
    (used,) = store.cached()
    assert used.last_used_ns > 1_600_000_000 * 10**9
    assert path.stat() == before


def test_holes_are_free(tmp_path: Path, chains: list[list[Link]]) -> None:
    store = store_for(tmp_path, RAM)
    store.make(chains[0], RAM)
    (image,) = store.cached()
    assert image.allocated_bytes == 4 * PAGE_SIZE


def test_all_zero_ram_is_exempt(tmp_path: Path, chains: list[list[Link]]) -> None:
    store = store_for(tmp_path, 0)
    zero = store.make((), RAM)
    used_at_start = zero.with_suffix(".json")
    os.utime(used_at_start, (1, 1))
    for chain in chains:
        store.make(chain, RAM)
    assert store.find(zero.stem, RAM) == zero
    assert present(store, chains) == [2]


def test_what_cannot_be_used_goes_first(tmp_path: Path, chains: list[list[Link]]) -> None:
    store = store_for(tmp_path, 6)
    for chain in chains[:2]:
        store.budget = 9 * PAGE_SIZE
        path = store.make(chain, RAM)
    path.with_suffix(".json").unlink()  # as a crash leaves it
    store.budget = 6 * PAGE_SIZE
    store.make(chains[2], RAM)
    assert present(store, chains) == [0, 2]
    assert not path.exists()


def test_one_that_is_being_made_stays(tmp_path: Path, chains: list[list[Link]]) -> None:
    store = store_for(tmp_path, 9)
    for chain in chains[:2]:
        store.make(chain, RAM)
    used_at(store, chains[0], 1000)
    store.budget = 5 * PAGE_SIZE
    with locked(store.directory / f".{root_of(chains[0])[:2]}.lock"):
        store.make(chains[2], RAM)
    assert present(store, chains) == [0, 2], "the next one goes in its place"


# Under its users ------------------------------------------------------------------------------


def test_a_running_fork_keeps_what_it_has_mapped(tmp_path: Path, chains: list[list[Link]]) -> None:
    store = store_for(tmp_path, 0)
    path = store.make(chains[0], RAM)
    page = PAGE_SIZE
    with guest_on(path) as guest:
        guest.do(f"ram[{2 * page}] = 77")
        store.make(chains[1], RAM)
        assert not path.exists()
        guest.do(f"assert (ram[{page}], ram[{2 * page}], ram[{3 * page}]) == (1, 77, 3)")
        assert store.make(chains[0], RAM) == path
        guest.do(f"assert (ram[{9 * page}], ram[{2 * page}]) == (4, 77)")
    assert path.read_bytes() == ram_of(MEMORIES[0]).tobytes()


def test_a_fork_opens_by_descriptor_what_was_evicted(
    tmp_path: Path, chains: list[list[Link]]
) -> None:
    store = store_for(tmp_path, 0)
    store.make(chains[0], RAM)
    script = "import os, sys; st = os.stat(sys.argv[1]); print(st.st_ino, st.st_size, st.st_nlink)"
    with opened(store, chains[0]) as image:
        inode = image.path.stat().st_ino
        store.make(chains[1], RAM)
        assert not image.path.exists()
        name = f"/proc/self/fd/{image.fd}"
        output = subprocess.check_output(
            [sys.executable, "-c", script, name], pass_fds=(image.fd,), text=True
        )
        assert output.split() == [str(inode), str(RAM * PAGE_SIZE), "0"]
        assert os.pread(image.fd, RAM * PAGE_SIZE, 0) == ram_of(MEMORIES[0]).tobytes()


def test_no_descriptor_is_left_open(tmp_path: Path, chains: list[list[Link]]) -> None:
    store = store_for(tmp_path, 4)
    before = open_files()
    for chain in (*chains, *chains):
        store.make(chain, RAM)
        store.find(root_of(chain), RAM)
        store.find(root_of(chain), 2 * RAM)
        opened(store, chain).close()
        store.nearest(chain, RAM)[0].close()
    assert open_files() == before


def test_who_waited_for_an_image_evicts_what_was_passed_over(
    tmp_path: Path, chains: list[list[Link]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image is not evicted while it is locked, so whoever held the lock has to look again."""
    store = store_for(tmp_path, 9)
    for chain in chains:
        store.make(chain, RAM)
    store.budget = 0
    stamp = store.directory / f"{root_of(chains[0])}.json"
    hidden = tmp_path / "stamp"
    waits = threading.Event()

    def announced(path: Path) -> AbstractContextManager[None]:
        waits.set()
        return locked(path)

    with ThreadPoolExecutor(1) as pool:
        with locked(store.directory / f".{root_of(chains[0])[:2]}.lock"):
            stamp.rename(hidden)  # it is not there yet
            monkeypatch.setattr("ratoon.store.memory.cache.locked", announced)
            made = pool.submit(store.make, chains[0], RAM)
            assert waits.wait(300)
            hidden.rename(stamp)  # and now it is
        made.result(30)
    assert present(store, chains) == [0]


def test_eviction_and_making_race_with_forks(tmp_path: Path, chains: list[list[Link]]) -> None:
    """Each fork has a whole image in hand, though the budget holds one of the three only."""
    store = store_for(tmp_path, 0)
    expected = [ram_of(layer).tobytes() for layer in MEMORIES]

    def fork(number: int) -> bool:
        which = number % 3
        for _ in range(100):
            store.make(chains[which], RAM)
            image = store.open(root_of(chains[which]), RAM)
            if image:
                with image:
                    return os.pread(image.fd, RAM * PAGE_SIZE, 0) == expected[which]
        return False

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(fork, range(90)))
    store.make(chains[0], RAM)
    assert present(store, chains) == [0]
    assert not [path for path in store.directory.iterdir() if path.suffix == ".tmp"]
