"""Snapshots with real memory layers, and nothing else in their directories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fake_snapshots import MACHINE, digest
from ratoon.disk.qcow2 import disk_root
from ratoon.memory.chain import overlay
from ratoon.memory.digests import hash_pages, memory_root, zero_array
from ratoon.memory.page import PAGE_SIZE
from ratoon.memory.writing import write_page_set
from ratoon.snapshot.manifest import (
    FileRef,
    GuestInfo,
    LayerRef,
    Manifest,
    MemoryFile,
    ParentRef,
)
from ratoon.snapshot.snapshot import Snapshot

#: RAM of the guests here, in pages.
RAM = MACHINE.ram_bytes // PAGE_SIZE

#: Page number -> the byte that fills the page.
Layer = Mapping[int, int]


def ram_of(chain: Sequence[Layer]) -> NDArray[np.uint8]:
    """The whole RAM of a chain's head, shape (RAM, 4096)."""
    ram = np.zeros((RAM, PAGE_SIZE), np.uint8)
    for layer in chain:
        for number, fill in layer.items():
            ram[number] = fill
    return ram


def make_chain(directory: Path, chain: Sequence[Layer]) -> list[Snapshot]:
    """The snapshots `s0` (the base), `s1`, …: one for each layer, each on the one before."""
    snapshots: list[Snapshot] = []
    layers: tuple[LayerRef, ...] = ()
    array = zero_array(RAM)
    for depth, layer in enumerate(chain):
        path = directory / f"s{depth}"
        path.mkdir(parents=True)
        for below in range(depth):
            ancestry = path / "ancestry" / str(below)
            ancestry.mkdir(parents=True)
            (ancestry / "memory.bin").hardlink_to(directory / f"s{below}" / "memory.bin")
        pages = np.array([[fill] * PAGE_SIZE for fill in layer.values()], np.uint8)
        pages = pages.reshape(-1, PAGE_SIZE)
        numbers = np.array(list(layer), np.uint64)
        index = write_page_set(
            path / "memory.bin", RAM, numbers, hash_pages(pages), pages, np.arange(len(numbers))
        )
        array = overlay(array, index)
        root = memory_root(array)
        own = LayerRef(
            tag=f"s{depth}",
            id=f"{depth:032x}",
            memory_root=root,
            memory=MemoryFile(
                index_digest=index.index_digest,
                entries=len(layer),
                stored=index.stored,
                size=(path / "memory.bin").stat().st_size,
            ),
            disk=FileRef(digest=digest(b"disk"), size=0),
        )
        parent = None
        if layers:
            below_own = layers[-1]
            parent = ParentRef(
                tag=below_own.tag, id=below_own.id, memory_root=below_own.memory_root
            )
        layers = (*layers, own)
        manifest = Manifest(
            tag=own.tag,
            id=own.id,
            created_at_unix=0.0,
            parent=parent,
            memory_root=root,
            disk_root=disk_root([layer.disk.digest for layer in layers]),
            machine=MACHINE,
            vmstate=FileRef(digest=digest(b""), size=0),
            layers=layers,
            guest=GuestInfo(image="none", agent_version=1),
            stages={},
        )
        snapshots.append(Snapshot(path, manifest))
    return snapshots


def with_root(snapshot: Snapshot, layer: int, root: str) -> Snapshot:
    """The same files, of which the manifest says that the chain up to `layer` gives `root`."""
    manifest = snapshot.manifest
    layers = list(manifest.layers)
    layers[layer] = layers[layer].model_copy(update={"memory_root": root})
    return replace(snapshot, manifest=manifest.model_copy(update={"layers": tuple(layers)}))
