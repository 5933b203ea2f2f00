"""What the memory tests share: page sets from dicts, chains of them, and a process with RAM."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from ratoon.store.memory.chain import Link, overlay
from ratoon.store.memory.digests import hash_pages, memory_root, zero_array
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import DATA_OFFSET, PageIndex, read_index
from ratoon.store.memory.writing import write_page_set

#: A layer in short: page number -> the byte its page begins and ends with. 0 is the zero page.
Layer = Mapping[int, int]

#: RAM of the small guests here, in pages.
RAM = 64

layers = st.dictionaries(st.integers(0, RAM - 1), st.integers(0, 5), max_size=20)
chains = st.lists(layers, min_size=1, max_size=4)


def page(fill: int) -> NDArray[np.uint8]:
    content = np.zeros(PAGE_SIZE, np.uint8)
    content[[0, -1]] = fill
    return content


def u64(numbers: Sequence[int]) -> NDArray[np.uint64]:
    return np.array(numbers, np.uint64)


def write_layer(path: Path, layer: Layer, ram_pages: int = RAM) -> PageIndex:
    """Write `layer`; its pages lie in the buffer in reverse, to put `rows` to use."""
    numbers = sorted(layer)
    pages = np.array([page(layer[n]) for n in reversed(numbers)], np.uint8).reshape(-1, PAGE_SIZE)
    rows = np.arange(len(numbers))[::-1].copy()
    digests = hash_pages(pages)[rows]
    return write_page_set(path, ram_pages, u64(numbers), digests, pages, rows)


def write_chain(directory: Path, chain: Sequence[Layer], ram_pages: int = RAM) -> list[Link]:
    """The layers L0, L1, … as files, and the links with the roots that they give."""
    links = []
    array = zero_array(ram_pages)
    for i, layer in enumerate(chain):
        path = directory / f"L{i}"
        index = write_layer(path, layer, ram_pages)
        array = overlay(array, index)
        links.append(Link(f"L{i}", path, index, memory_root(array)))
    return links


def last_data_byte(path: Path) -> int:
    """Where the last page of a plain layer ends in its file."""
    return DATA_OFFSET + read_index(path, label="L").stored * PAGE_SIZE - 1


def flatten(chain: Sequence[Layer]) -> dict[int, int]:
    return {number: fill for layer in chain for number, fill in layer.items()}


def ram_of(pages: Layer, ram_pages: int = RAM) -> NDArray[np.uint8]:
    """The whole RAM, shape (ram_pages, 4096)."""
    ram = np.zeros((ram_pages, PAGE_SIZE), np.uint8)
    for number, fill in pages.items():
        ram[number] = page(fill)
    return ram


_GUEST = """
import mmap, os, sys
with open(sys.argv[1], "rb") as file:
    ram = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Guest:
    """A process that has mapped a file privately, as a VM does, and does as it is told."""

    def __init__(self, image: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _GUEST, str(image)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self._expect("ready")

    def do(self, statement: str) -> None:
        """Run one line of Python with the mapping as `ram`; returns when it has run."""
        assert self._process.stdin
        self._process.stdin.write(statement + "\n")
        self._process.stdin.flush()
        self._expect("done")

    def kill(self, *, reap: bool = True) -> None:
        self._process.kill()
        if reap:
            self._process.wait()

    def close(self) -> None:
        self.kill()
        self._process.communicate()

    def _expect(self, answer: str) -> None:
        assert self._process.stdout
        assert self._process.stdout.readline().strip() == answer


@contextmanager
def guest_on(image: Path) -> Iterator[Guest]:
    guest = Guest(image)
    try:
        yield guest
    finally:
        guest.close()
