"""Flattening: a chain of disk layers, or its upper part, into one file of the same content.

The work is `qemu-img`'s. It is given the graph as options, since no header names a backing file,
and the layers are named relative to a common directory: so one argument holds a deep chain.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ratoon import files
from ratoon.artifacts import run
from ratoon.store.disk.qcow2 import Qcow2Header, check_header


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
            directory, graph = _graph([*below, target, upper])
            run(["qemu-img", "commit", "-q", "-d", graph], cwd=directory)
            upper.unlink()
        return _finished(target)


def flatten_raw(layers: Sequence[Path], target: Path) -> None:
    """As `flatten`, into a sparse raw file for temporary use: writable, and not flushed."""
    _convert(layers, target, "raw")


def allocated_above(layers: Sequence[Path], shared: int) -> list[Extent]:
    """Where the layers above the first `shared` ones have anything, zeros included; by `qemu-img`.

    Reads the layers' tables and none of their data. All of the disk for `shared` 0.
    """
    directory, graph = _graph(layers)
    listed = run(["qemu-img", "map", "--output=json", graph], cwd=directory)
    extents = _EXTENTS.validate_json(listed)
    return [extent for extent in extents if extent.depth < len(layers) - shared]


def _finished(target: Path) -> Qcow2Header:
    header = check_header(target, label=f"the flattened disk {target}")
    target.chmod(0o444)
    files.fsync_path(target)
    return header


def _convert(layers: Sequence[Path], target: Path, kind: str) -> None:
    target = target.absolute()
    directory, graph = _graph(layers)
    with target.open("xb"):  # qemu-img would replace what is there
        target.chmod(0o600)
    with files.removed_on_error(target):
        run(["qemu-img", "convert", "-O", kind, graph, target], cwd=directory)


def _graph(layers: Sequence[Path]) -> tuple[Path, str]:
    """The directory to run `qemu-img` in, and the name of the top layer there, with all below."""
    directory = Path(os.path.commonpath([path.absolute().parent for path in layers]))
    node: dict[str, Any] | None = None
    for path in layers:
        name = str(path.absolute().relative_to(directory))
        node = {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": name},
            "backing": node,
        }
    return directory, "json:" + json.dumps(node, separators=(",", ":"))
