"""Flattening: a chain of disk layers, or its upper part, into one file of the same content.

The work is `qemu-img`'s, in a cell. It is given the graph as options, since no header names a
backing file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ratoon import files
from ratoon.errors import HostError
from ratoon.jail.errand import MOST_SAID
from ratoon.store.disk.qcow2 import Qcow2Header, check_header
from ratoon.store.disk.tools import tool
from ratoon.units import MIB


@dataclass(frozen=True)
class Extent:
    """A stretch of a disk, in bytes, and how far below the top the layer lies that has it."""

    start: int
    length: int
    depth: int


_EXTENTS = TypeAdapter(list[Extent])


def flatten(layers: Sequence[Path], target: Path) -> Qcow2Header:
    """Make the new file `target` one qcow2 with the content of `layers`, base first; its header.

    The layers must have been verified. Flushed, mode 0444, no backing file in its header (which is
    checked); a failure leaves no file. HostError: `qemu-img` is missing or failed.
    """
    _convert(layers, target, "qcow2")
    with files.removed_on_error(target):
        return _finished(target)


def merge(below: Sequence[Path], layers: Sequence[Path], target: Path) -> Qcow2Header:
    """Make the new file `target` one layer with what `layers` have, lowest first; its header.

    Like the lowest of them it lies on `below`, base first. Otherwise as `flatten`.
    """
    files.copy_sparse(layers[0], target)
    upper = target.with_name(f"{target.name.removesuffix('.tmp')}.upper.tmp")
    with files.removed_on_error(target), files.removed_on_error(upper):
        for layer in layers[1:]:
            # qemu-img opens both for writing, and what was published never changes.
            files.copy_sparse(layer, upper)
            with tool("qemu-img", _longest([*below, target])) as qemu_img:
                chain = [*map(qemu_img.reads, below), *map(qemu_img.writes, (target, upper))]
                qemu_img.run("commit", "-q", "-d", _graph(chain))
            upper.unlink()
        return _finished(target)


def flatten_raw(layers: Sequence[Path], target: Path) -> None:
    """As `flatten`, into a sparse raw file for temporary use: writable, and not flushed."""
    _convert(layers, target, "raw")


def from_raw(raw: Path, target: Path) -> None:
    """Make the new file `target` one qcow2 with the content of a raw disk that is ours alone.

    Mode 0600, and not flushed; a failure leaves no file. HostError: as for `flatten`.
    """
    with files.new_file(target), tool("qemu-img", _room_for(raw.stat().st_size)) as qemu_img:
        names = qemu_img.writes(raw), qemu_img.writes(target)
        qemu_img.run("convert", "-f", "raw", "-O", "qcow2", *names)


def allocated_above(layers: Sequence[Path], shared: int) -> list[Extent]:
    """Where the layers above the first `shared` ones have anything, zeros included; by `qemu-img`.

    Reads the layers' tables and none of their data. All of the disk for `shared` 0.
    """
    with tool("qemu-img", MOST_SAID) as qemu_img:
        listed = qemu_img.run("map", "--output=json", _graph([*map(qemu_img.reads, layers)]))
    try:
        extents = _EXTENTS.validate_json(listed)
    except ValidationError as error:
        raise HostError(f"qemu-img lists no extents: {error}") from None
    return [extent for extent in extents if extent.depth < len(layers) - shared]


def _finished(target: Path) -> Qcow2Header:
    header = check_header(target, label=f"the flattened disk {target}")
    target.chmod(0o444)
    files.fsync_path(target)
    return header


def _convert(layers: Sequence[Path], target: Path, kind: str) -> None:
    # There already: qemu-img would replace what is there.
    with files.new_file(target), tool("qemu-img", _longest(layers)) as qemu_img:
        graph = _graph([*map(qemu_img.reads, layers)])
        qemu_img.run("convert", "-O", kind, graph, qemu_img.writes(target))


def _longest(chain: Sequence[Path]) -> int:
    """The base says how large the disk is; who wrote it did not read the others."""
    return _room_for(check_header(chain[0], label=f"the disk layer {chain[0]}").virtual_size)


def _room_for(disk_bytes: int) -> int:
    """The length of a file that holds a disk, with its tables and what is freed but still there."""
    return 2 * disk_bytes + 64 * MIB


def _graph(layers: Sequence[str]) -> str:
    """The top layer, with all below it."""
    node: dict[str, Any] | None = None
    for name in layers:
        node = {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": name},
            "backing": node,
        }
    return "json:" + json.dumps(node, separators=(",", ":"))
