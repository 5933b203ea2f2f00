"""Chains against the plain model: a dict for each layer, merged."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_helpers import RAM, chains, flatten, page, ram_of, write_chain, write_layer
from ratoon.errors import ChainMismatch, Corrupt
from ratoon.store.memory.chain import count_above, owners, pages_above, resolve
from ratoon.store.memory.digests import hash_pages, memory_root, zero_array
from ratoon.store.memory.pageset import DATA_OFFSET


@given(chains)
def test_resolve_gives_the_digests_of_the_merged_memory(chain: list[dict[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        links = write_chain(Path(directory), chain)
    assert np.array_equal(resolve(links, RAM), hash_pages(ram_of(flatten(chain))))


@given(chains)
def test_the_newest_layer_owns_a_page(chain: list[dict[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        links = write_chain(Path(directory), chain)
    numbers, position, entry = owners(links)
    assert numbers.tolist() == sorted(flatten(chain))
    for number, i, e in zip(numbers, position, entry, strict=True):
        assert i == max(i for i, layer in enumerate(chain) if int(number) in layer)
        assert links[i].index.numbers[e] == number


@given(chains, st.data())
def test_pages_above_turn_the_lower_memory_into_the_heads(
    chain: list[dict[int, int]], data: st.DataObject
) -> None:
    covered = data.draw(st.integers(0, len(chain)))
    ram = ram_of(flatten(chain[:covered]))
    seen = []
    with tempfile.TemporaryDirectory() as directory:
        links = write_chain(Path(directory), chain)
        for numbers, pages in pages_above(links, covered):
            ram[numbers.astype(np.int64)] = pages
            seen += numbers.tolist()
    assert np.array_equal(ram, ram_of(flatten(chain)))
    assert len(seen) == len(set(seen)) == count_above(links, covered)


def test_a_page_that_became_zero_is_patched_to_zero(tmp_path: Path) -> None:
    links = write_chain(tmp_path, [{1: 5, 2: 6}, {1: 0}])
    [(numbers, pages)] = pages_above(links, 1)
    assert numbers.tolist() == [1]
    assert not pages.any()
    assert count_above(links, 0) == 1


def test_a_page_in_two_layers_is_read_from_the_newest_alone(tmp_path: Path) -> None:
    links = write_chain(tmp_path, [{}, {7: 1}, {7: 2}])
    links[1].path.unlink()  # would be missed
    links[1].path.touch()
    [(numbers, pages)] = pages_above(links, 1)
    assert numbers.tolist() == [7]
    assert np.array_equal(pages[0], page(2))


def test_no_links_are_zero_memory() -> None:
    assert np.array_equal(resolve((), RAM), zero_array(RAM))
    assert owners(())[0].tolist() == []
    assert count_above((), 0) == 0


@pytest.mark.parametrize("swapped", [0, 1, 2])
def test_a_layer_of_another_chain_is_named_with_both_roots(tmp_path: Path, swapped: int) -> None:
    links = write_chain(tmp_path, [{1: 1}, {2: 2}, {3: 3}])
    links[swapped] = replace(links[swapped], index=write_layer(tmp_path / "other", {9: 1}))
    with pytest.raises(ChainMismatch) as caught:
        resolve(links, RAM)
    chain = [*[{1: 1}, {2: 2}, {3: 3}][:swapped], {9: 1}]
    found = memory_root(hash_pages(ram_of(flatten(chain))))
    assert (caught.value.expected, caught.value.found) == (links[swapped].root, found)
    assert f"link L{swapped} " in str(caught.value)


def test_layers_of_another_ram_size_are_named(tmp_path: Path) -> None:
    links = write_chain(tmp_path, [{1: 1}, {2: 2}])
    links[1] = replace(links[1], index=write_layer(tmp_path / "big", {2: 2}, 2 * RAM))
    with pytest.raises(Corrupt, match=r"snapshot L1, .* 128 pages of RAM, its chain has 64"):
        resolve(links, RAM)


def test_damaged_pages_name_their_snapshot(tmp_path: Path) -> None:
    links = write_chain(tmp_path, [{1: 1}, {2: 2}])
    links[1].path.chmod(0o600)
    with links[1].path.open("r+b") as file:
        file.seek(DATA_OFFSET)
        file.write(b"!")
    with pytest.raises(Corrupt, match="snapshot L1, memory layer: page 2 "):
        list(pages_above(links, 0))
