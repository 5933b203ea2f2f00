"""Chains of disk layers flattened, and compared as the guest sees them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from ratoon.errors import HostError
from ratoon.store.disk.compare import GRAIN, changed_bytes
from ratoon.store.disk.flatten import allocated_above, flatten, flatten_raw, merge
from ratoon.store.disk.qcow2 import check_header
from small_snapshots import KIB, make_layer

CLUSTER = 64 * KIB


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    """1 MiB: A in clusters 0 and 1; above it, B in a part of 1, and in 2; above it, 0 discarded."""
    directories = [tmp_path / name for name in ("one", "two,=:", "three")]
    for directory in directories:
        directory.mkdir()
    return [
        make_layer(directories[0] / "disk.qcow2", "write -P 0x41 0 128k"),
        # A whole cluster, as QEMU writes it when the backing file is known to it.
        make_layer(
            directories[1] / "disk.qcow2",
            *("write -P 0x41 64k 64k", "write -P 0x42 68k 4k", "write -P 0x42 128k 64k"),
        ),
        make_layer(directories[2] / "disk.qcow2", "write -z 0 64k"),
    ]


SEEN = bytes(64 * KIB) + b"A" * 4096 + b"B" * 4096 + b"A" * (56 * KIB) + b"B" * (64 * KIB)


def test_a_flattened_disk_is_one_file_with_what_the_guest_sees(
    tmp_path: Path, layers: list[Path]
) -> None:
    header = flatten(layers, tmp_path / "flat")
    assert header == check_header(tmp_path / "flat", label="flat")
    assert header.virtual_size == 1 << 20
    info = json.loads(
        subprocess.run(
            ["qemu-img", "info", "--output=json", tmp_path / "flat"],
            capture_output=True,
            check=True,
        ).stdout
    )
    assert info["format"] == "qcow2"
    assert not [key for key in info if "backing" in key]
    assert (tmp_path / "flat").stat().st_mode & 0o777 == 0o444
    flatten_raw([tmp_path / "flat"], tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == SEEN.ljust(1 << 20, b"\0")


def seen(layers: list[Path], target: Path) -> bytes:
    flatten_raw(layers, target)
    return target.read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_the_upper_layers_merged_into_one(tmp_path: Path, layers: list[Path], kept: int) -> None:
    """With what they hide: a discarded cluster must not show what lies below again."""
    directory = tmp_path / "more"
    directory.mkdir()
    more = [
        make_layer(directory / "four", "write -z -u 128k 64k", "write -P 0x43 192k 4k"),
        make_layer(directory / "five", "discard 64k 64k", "write -P 0x44 0 4k"),
    ]
    chain = [*layers, *more]
    before = [path.read_bytes() for path in chain]
    header = merge(chain[:kept], chain[kept:], directory / "merged")
    assert header.virtual_size == 1 << 20
    assert (directory / "merged").stat().st_mode & 0o777 == 0o444
    expected = seen(chain, tmp_path / "expected")
    assert seen([*chain[:kept], directory / "merged"], tmp_path / "raw") == expected
    assert expected != seen(layers, tmp_path / "other")
    assert [path.read_bytes() for path in chain] == before
    assert sorted(path.name for path in directory.iterdir()) == ["five", "four", "merged"]


def test_one_layer_merged_is_a_copy(tmp_path: Path, layers: list[Path]) -> None:
    merge(layers[:2], layers[2:], tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == layers[2].read_bytes()


def test_a_merge_that_fails_leaves_nothing(tmp_path: Path, layers: list[Path]) -> None:
    broken = layers[2].with_name("broken")
    broken.write_bytes(b"no disk")
    with pytest.raises(HostError, match="qemu-img"):
        merge(layers[:1], [layers[1], broken], tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_a_raw_copy_is_sparse_and_writable(tmp_path: Path, layers: list[Path]) -> None:
    flatten_raw(layers, tmp_path / "raw")
    raw = tmp_path / "raw"
    assert raw.read_bytes() == SEEN.ljust(1 << 20, b"\0")
    assert raw.stat().st_blocks * 512 < 256 * KIB
    assert raw.stat().st_mode & 0o777 == 0o600


def test_a_failure_leaves_no_file_and_replaces_none(tmp_path: Path, layers: list[Path]) -> None:
    layers[1].write_bytes(b"no disk")
    with pytest.raises(HostError, match="qemu-img"):
        flatten(layers, tmp_path / "flat")
    assert not (tmp_path / "flat").exists()
    (tmp_path / "flat").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        flatten(layers, tmp_path / "flat")
    assert (tmp_path / "flat").read_bytes() == b"mine"


def test_where_the_layers_above_have_something(layers: list[Path]) -> None:
    def stretches(shared: int) -> list[tuple[int, int]]:
        found = allocated_above(layers, shared)
        return [(extent.start, extent.length) for extent in found]

    assert stretches(3) == []
    assert stretches(2) == [(0, CLUSTER)]
    assert sum(length for _, length in stretches(1)) == 3 * CLUSTER
    assert sum(length for _, length in stretches(0)) == 1 << 20


def changed(tmp_path: Path, left: list[Path], right: list[Path], shared: int) -> int:
    flat = tmp_path / "left.raw", tmp_path / "right.raw"
    for layers, raw in zip((left, right), flat, strict=True):
        raw.unlink(missing_ok=True)
        flatten_raw(layers, raw)
    return changed_bytes((left, right), flat, shared)


def test_bytes_that_differ_count_in_grains(tmp_path: Path, layers: list[Path]) -> None:
    assert changed(tmp_path, layers, layers, 3) == 0
    assert changed(tmp_path, layers[:2], layers, 2) == CLUSTER
    assert changed(tmp_path, layers[:1], layers[:2], 1) == CLUSTER + GRAIN
    assert changed(tmp_path, layers[:1], layers, 1) == 2 * CLUSTER + GRAIN
    # The same, without knowing that something is shared.
    assert changed(tmp_path, layers[:1], layers, 0) == 2 * CLUSTER + GRAIN


def test_what_was_written_again_as_it_was_does_not_count(
    tmp_path: Path, layers: list[Path]
) -> None:
    (tmp_path / "four").mkdir()
    same = make_layer(tmp_path / "four" / "disk.qcow2", "write -P 0x41 0 64k")
    assert changed(tmp_path, layers[:1], [layers[0], same], 1) == 0


def test_shared_layers_are_not_compared(tmp_path: Path, layers: list[Path]) -> None:
    flat = tmp_path / "left.raw", tmp_path / "right.raw"
    for raw in flat:
        flatten_raw(layers[:1], raw)
    with flat[0].open("r+b") as file:  # would be noticed
        file.seek(200 * KIB)
        file.write(b"x")
    assert changed_bytes((layers[:1], layers[:2]), flat, 1) == 0


def test_a_shorter_disk_counts_as_zeros_beyond_its_end(tmp_path: Path, layers: list[Path]) -> None:
    (tmp_path / "long").mkdir()
    long = make_layer(
        tmp_path / "long" / "disk.qcow2",
        *("write -P 0x41 0 128k", "write -P 0x43 1536k 8k"),
        disk_bytes=2 << 20,
    )
    assert changed(tmp_path, layers[:1], [long], 0) == 2 * GRAIN
