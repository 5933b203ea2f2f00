"""qcow2 headers that can be trusted, and overlays made without a process."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from disk_tools import looked_for_again
from ratoon.errors import Corrupt, HostError, InvalidInput, RatoonError
from ratoon.store.disk.qcow2 import (
    OverlayTemplates,
    Qcow2Header,
    check_header,
    disk_root,
    file_digest,
)
from ratoon.units import GIB


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, "8G")
    return path.read_bytes()


def patched(raw: bytes, offset: int, fmt: str, value: int) -> bytes:
    changed = bytearray(raw)
    struct.pack_into(">" + fmt, changed, offset, value)
    return bytes(changed)


def check(path: Path, raw: bytes) -> Qcow2Header:
    path.write_bytes(raw)
    return check_header(path, label="the disk")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("compat=v2", Qcow2Header(2, 8 * GIB, 16)),
        ("compat=v3", Qcow2Header(3, 8 * GIB, 16)),
        ("cluster_size=512", Qcow2Header(3, 8 * GIB, 9)),
        ("cluster_size=2M", Qcow2Header(3, 8 * GIB, 21)),
        ("extended_l2=on,cluster_size=128k", Qcow2Header(3, 8 * GIB, 17)),
        ("compression_type=zstd", Qcow2Header(3, 8 * GIB, 16)),
        ("refcount_bits=1", Qcow2Header(3, 8 * GIB, 16)),
    ],
)
def test_what_qemu_makes_is_sound(tmp_path: Path, options: str, expected: Qcow2Header) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-f", "qcow2", "-o", options, path, "8G")
    assert check_header(path, label="the disk") == expected


def test_a_backing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", "-u", path, "8G")
    with pytest.raises(InvalidInput, match="the disk: its header names a backing file"):
        check_header(path, label="the disk")


def test_an_external_data_file_is_refused(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", path, "8G")
    with pytest.raises(InvalidInput, match="external data file"):
        check_header(path, label="the disk")
    # The extension alone, without the feature bit that makes QEMU use it.
    with pytest.raises(InvalidInput, match="external data file"):
        check(path, patched(path.read_bytes(), 72, "Q", 0))


def test_an_encrypted_disk_is_refused(tmp_path: Path, sound: bytes) -> None:
    for method in (1, 2):
        with pytest.raises(InvalidInput, match="encrypted"):
            check(tmp_path / "disk", patched(sound, 32, "I", method))


@pytest.mark.parametrize(
    ("offset", "fmt", "value", "error"),
    [
        (0, "I", 0, "not a qcow2"),
        (4, "I", 1, "version 1"),
        (4, "I", 4, "version 4"),
        (20, "I", 8, r"clusters of 2\^8"),
        (20, "I", 0xFFFFFFFF, "clusters of"),
        (24, "Q", 0, "0 bytes of disk"),
        (24, "Q", 1 << 63, "bytes of disk with 16 L1"),
        (36, "I", 0xFFFFFFFF, "L1 entries"),
        (40, "Q", 0, "L1 table lies"),
        (40, "Q", 1, "L1 table lies"),
        (40, "Q", 1 << 63, "truncated: its L1"),
        (48, "Q", 1 << 40, "truncated: its refcount"),
        (56, "I", 0, "refcount table of 0"),
        (72, "Q", 1, "not closed cleanly"),
        (72, "Q", 2, "marked it as corrupt"),
        (72, "Q", 1 << 40, "unknown qcow2 features"),
        (96, "I", 7, "refcounts of"),
        (100, "I", 96, "header of 96"),
        (100, "I", 0xFFFFFFF8, "header of"),
        (116, "I", 0xFFFFFFFF, "header extension"),
    ],
)
def test_absurd_fields_are_named(
    tmp_path: Path, sound: bytes, offset: int, fmt: str, value: int, error: str
) -> None:
    with pytest.raises(RatoonError, match=f"the disk: .*{error}"):
        check(tmp_path / "disk", patched(sound, offset, fmt, value))


def test_truncation_is_found_wherever_it_cuts(tmp_path: Path, sound: bytes) -> None:
    for length in (*range(4, 130), 1 << 16, 3 << 16, len(sound) - 1):
        with pytest.raises(Corrupt, match="the disk: "):
            check(tmp_path / "disk", sound[:length])


def test_only_a_regular_file_is_a_disk(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(InvalidInput, match="not a regular file"):
            check_header(path, label="the disk")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_bytes_surprise_the_parser(
    tmp_path_factory: pytest.TempPathFactory, sound: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.qcow2"
    raw = data.draw(
        st.one_of(
            st.binary(max_size=200),
            st.binary(max_size=300).map(lambda tail: sound[:4] + tail),
            st.tuples(st.integers(4, 130), st.binary(min_size=1, max_size=16)).map(
                lambda at: sound[: at[0]] + at[1] + sound[at[0] + len(at[1]) :]
            ),
        )
    )
    try:
        header = check(path, raw)
    except RatoonError:
        return
    assert header.virtual_size > 0


def test_an_overlay_is_an_empty_disk_without_backing(tmp_path: Path) -> None:
    templates = OverlayTemplates(tmp_path)
    path = tmp_path / "disk.qcow2"
    templates.create(path, 8 * GIB)
    qemu_img("check", path)
    assert check_header(path, label="overlay") == Qcow2Header(3, 8 * GIB, 16)
    # Clusters are 64 KiB, and of the four only the first pages say something.
    assert path.stat().st_blocks * 512 <= 32 << 10


def test_qemu_img_runs_once_per_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OverlayTemplates(tmp_path).create(tmp_path / "first", GIB)
    with monkeypatch.context() as patch, looked_for_again():
        patch.setenv("PATH", "")
        OverlayTemplates(tmp_path).create(tmp_path / "second", GIB)
        with pytest.raises(HostError, match="qemu-img is not installed"):
            OverlayTemplates(tmp_path).create(tmp_path / "third", 2 * GIB)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert (tmp_path / "first").stat().st_ino != (tmp_path / "second").stat().st_ino
    assert {p.name for p in tmp_path.iterdir()} == {"first", "second", f"overlay-{GIB}.qcow2"}


def test_a_refusal_of_qemu_img_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="qemu-img failed with exit code 1:\nqemu-img: "):
        OverlayTemplates(tmp_path).create(tmp_path / "disk", 1 << 62)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, -512, 1000])
def test_an_impossible_size_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(InvalidInput, match=f"disk size {size}"):
        OverlayTemplates(tmp_path).create(tmp_path / "disk", size)


def test_an_overlay_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        OverlayTemplates(tmp_path).create(tmp_path / "disk", GIB)
    assert (tmp_path / "disk").read_bytes() == b"precious"


@pytest.mark.parametrize("content", [b"", b"x", bytes(3 << 20)])
def test_a_file_has_the_digest_of_its_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == blake3(content).hexdigest()


def test_a_disk_root_depends_on_every_layer_and_their_order() -> None:
    a, b = "0a" * 32, "0b" * 32
    assert len({disk_root(layers) for layers in ([a], [b], [a, b], [b, a], [a, a])}) == 5
