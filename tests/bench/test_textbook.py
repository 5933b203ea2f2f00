"""The textbook way makes what an image is, and finds a parent that has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from ratoon.bench.disk import RAM_PAGES, LayerShape, write_chain
from ratoon.bench.textbook import Textbook, data_of, hashing_speed, sha256
from ratoon.errors import Corrupt
from ratoon.store.memory.chain import Link
from ratoon.store.memory.image import ImageStore

SHAPES = (LayerShape(300, 4, 2.4), LayerShape(40, 1.5, 1.9), LayerShape(10, 1, 1.5))


@pytest.fixture
def chain(tmp_path: Path) -> list[Link]:
    return write_chain(tmp_path, SHAPES)


@pytest.fixture
def textbook(tmp_path: Path, chain: list[Link]) -> Textbook:
    directory = tmp_path / "textbook"
    directory.mkdir()
    written = Textbook(directory)
    for depth in range(1, len(chain) + 1):
        written.write(chain[:depth], RAM_PAGES)
    return written


def test_what_is_assembled_is_the_image(
    tmp_path: Path, chain: list[Link], textbook: Textbook
) -> None:
    store = ImageStore(tmp_path / "images", budget=1 << 40)
    for depth in range(1, len(chain) + 1):
        image = store.make(chain[:depth], RAM_PAGES)
        assert textbook.last is None or textbook.last.copy_ms > 0
        with textbook.assemble(chain[depth - 1].root) as assembled:
            with image.open("rb") as file:
                assert sha256(image) == hashlib.file_digest(file, "sha256").hexdigest()
            for start, end in data_of(assembled.fd, RAM_PAGES * 4096):
                with image.open("rb") as file:
                    file.seek(start)
                    assert file.read(end - start) == os.pread(assembled.fd, end - start, start)
            assert sha256(Path(f"/proc/self/fd/{assembled.fd}")) == sha256(image)
        assert not assembled.path.exists()


def test_a_parent_that_has_changed_is_found(chain: list[Link], textbook: Textbook) -> None:
    parent = textbook.directory / chain[1].root
    with parent.open("r+b") as file:
        file.seek(int(chain[1].index.numbers[3]) * 4096 + 17)
        file.write(b"!")
    textbook.assemble(chain[1].root).close()  # nobody hashes the head itself
    with pytest.raises(Corrupt, match=chain[1].root):
        textbook.assemble(chain[2].root)


def test_a_chain_it_does_not_have_is_left_to_others(textbook: Textbook) -> None:
    assert textbook.open("f" * 64, RAM_PAGES) is None


def test_holes_are_hashed_as_zeros(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for at in (1 << 20, (3 << 20) + 4096):
            file.seek(at)
            file.write(os.urandom(5000))
        file.truncate((5 << 20) + 7)
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_its_speed_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    assert all(speed > 0 for speed in hashing_speed(path))
