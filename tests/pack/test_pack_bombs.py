"""Packs that grow: what is read into memory or written is bounded, whatever a pack declares."""

from __future__ import annotations

import json
import os
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from blake3 import blake3

from pack_helpers import (
    Members,
    archive_of,
    member,
    members_of,
    publish_chain,
    sealed,
    state_of,
    with_files,
    with_manifest,
    write_pack,
    zstd,
)
from ratoon.store.disk.qcow2 import disk_root
from ratoon.store.pack.pack import pack
from ratoon.store.pack.packfile import MAX_CONTENTS, MAX_MANIFEST, tar_header
from ratoon.store.snapshot.store import Store
from ratoon.units import MIB
from small_snapshots import digest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound pack of L2, the head of base, L1, L2."""
    store = Store.open(tmp_path / "source")
    publish_chain(store)
    return pack(store, "L2", tmp_path / "pack").path


@pytest.fixture
def members(path: Path) -> Members:
    return members_of(path)


def write_bomb(
    path: Path, begin: bytes, zeros: int, end: bytes = b"", window_log: int = 21
) -> None:
    """A pack that ends in `zeros` bytes of nothing, without ever holding them."""
    parameter = zstd.CompressionParameter
    compressor = zstd.ZstdCompressor(
        options={parameter.window_log: window_log, parameter.checksum_flag: 1}
    )
    with path.open("wb") as file:
        file.write(compressor.compress(begin))
        for at in range(0, zeros, MIB):
            file.write(compressor.compress(bytes(min(MIB, zeros - at))))
        file.write(compressor.compress(end) + compressor.flush())


def bomb_contents(path: Path, members: Members) -> str:
    """`pack.json` of 3 GiB."""
    write_bomb(path, tar_header("pack.json", 3 << 30), 3 << 30)
    return "pack.json has 3221225472 bytes, more than it may"


def bomb_contents_header(path: Path, members: Members) -> str:
    """`pack.json` of more bytes than there are."""
    write_bomb(path, tar_header("pack.json", 1 << 60), 1 << 30)
    return "does not begin with pack.json"


def bomb_largest_contents(path: Path, members: Members) -> str:
    """As many bad entries as `pack.json` may hold."""
    entry = b'{"name":1},'
    raw = b'{"format":1,"tag":"t","files":['
    raw += entry * ((MAX_CONTENTS - len(raw) - 20) // len(entry)) + b'{"name":1}]}'
    write_pack(path, archive_of({"pack.json": raw}))
    return "pack.json: files"


def bomb_manifest(path: Path, members: Members) -> str:
    """`manifest.json` of 2 GiB, and honestly so."""
    hasher = blake3()
    for _ in range(2048):
        hasher.update(bytes(MIB))
    contents = json.loads(members["pack.json"])
    contents["files"][0] |= {"size": 2 << 30, "digest": hasher.hexdigest()}
    raw = json.dumps(contents).encode()
    write_bomb(path, member("pack.json", raw) + tar_header("manifest.json", 2 << 30), 2 << 30)
    return "manifest.json has 2147483648 bytes, more than it may"


def bomb_largest_manifest(path: Path, members: Members) -> str:
    """As many bad layers as `manifest.json` may hold."""
    document = json.loads(members["manifest.json"])
    document["layers"] = []
    raw = json.dumps(document).encode()
    layers = b'"layers": [' + b"0," * ((MAX_MANIFEST - len(raw) - 10) // 2) + b"0]"
    raw = raw.replace(b'"layers": []', layers)
    assert len(raw) <= MAX_MANIFEST
    changed = {"manifest.json": raw, "manifest.b3": digest(raw).encode() + b"\n"}
    write_pack(path, archive_of(sealed({**members, **changed})))
    return "manifest.json: layers"


def bomb_many_errors(path: Path, members: Members) -> str:
    """As many bad entries as `manifest.json` may hold, where none ends the reading."""
    document = json.loads(members["manifest.json"])
    document["stages"] = {}
    raw = json.dumps(document).encode()
    stages = b'"stages": {' + b'"":"",' * ((MAX_MANIFEST - len(raw) - 10) // 6) + b'"":""}'
    raw = raw.replace(b'"stages": {}', stages)
    assert len(raw) <= MAX_MANIFEST
    changed = {"manifest.json": raw, "manifest.b3": digest(raw).encode() + b"\n"}
    write_pack(path, archive_of(sealed({**members, **changed})))
    return r"manifest.json: \d+ errors"


def bomb_window(path: Path, members: Members) -> str:
    """A frame that asks for 2 GiB of window."""
    write_bomb(path, archive_of(members), 0, window_log=31)
    return "too much memory"


def bomb_vmstate(path: Path, members: Members) -> str:
    """More device state than a fork would like to read at once."""
    document = json.loads(members["manifest.json"])
    document["vmstate"] = {"digest": "0" * 64, "size": 3 << 30}
    changed = with_manifest(members, document)
    contents = json.loads(changed["pack.json"])
    contents["files"][2] |= {"digest": "0" * 64, "size": 3 << 30}
    changed["pack.json"] = json.dumps(contents).encode()
    begin = b"".join(
        member(name, changed[name]) for name in ("pack.json", "manifest.json", "manifest.b3")
    )
    write_bomb(path, begin + tar_header("vmstate", 3 << 30), 3 << 30)
    return "3221225472 bytes of device state are too much"


def bomb_ram(path: Path, members: Members) -> str:
    """Three times the host's RAM, of which no layer has a page."""
    document = json.loads(members["manifest.json"])
    host = os.sysconf("SC_PHYS_PAGES")
    document["machine"]["ram_bytes"] = 3 * host * 4096
    changed = {}
    index = struct.pack("<8sIIQQQ24x", b"RATOONPS", 2, 4096, 3 * host, 0, 0).ljust(4096, b"\0")
    for number, layer in enumerate(document["layers"]):
        layer["memory"] = {"entries": 0, "index_digest": digest(index), "size": 4096, "stored": 0}
        changed["memory.bin" if number == 2 else f"ancestry/{number}/memory.bin"] = index
    write_pack(path, archive_of(with_manifest({**members, **changed}, document)))
    return "chain link base"


def bomb_disk(path: Path, members: Members, size: int = 1 << 30, *, room: bool = True) -> str:
    """A disk of zeros; with more of them than the host has room for, it is not begun."""
    hasher = blake3()
    for _ in range(size // MIB if room else 0):
        hasher.update(bytes(MIB))
    reference = {"digest": hasher.hexdigest(), "size": size}
    changed = with_files(members, {"ancestry/0/disk.qcow2": b""})
    document = json.loads(changed["manifest.json"])
    document["layers"][0]["disk"] = reference
    document["disk_root"] = disk_root([layer["disk"]["digest"] for layer in document["layers"]])
    changed = with_manifest(changed, document)
    contents = json.loads(changed["pack.json"])
    contents["files"][4] |= reference
    changed["pack.json"] = json.dumps(contents).encode()
    names = [*members][: [*members].index("ancestry/0/disk.qcow2")]
    begin = b"".join(member(name, changed[name]) for name in names)
    write_bomb(path, begin + tar_header("ancestry/0/disk.qcow2", size), size if room else MIB)
    return "disk.qcow2: not a qcow2 file" if room else r"needs \d+ bytes"


BOMBS: list[Callable[[Path, Members], str]] = [
    bomb_contents,
    bomb_contents_header,
    bomb_largest_contents,
    bomb_manifest,
    bomb_largest_manifest,
    bomb_many_errors,
    bomb_window,
    bomb_vmstate,
    bomb_ram,
    bomb_disk,
    partial(bomb_disk, size=1 << 62, room=False),
]

_UNPACK = """
import resource, sys
from pathlib import Path
from ratoon.errors import RatoonError
from ratoon.store.snapshot.store import Store
from ratoon.store.pack.unpack import unpack
store = Store.open(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF)
try:
    unpack(store, Path(sys.argv[2]))
except RatoonError as error:
    after = resource.getrusage(resource.RUSAGE_SELF)
    memory, blocks = after.ru_maxrss - before.ru_maxrss, after.ru_oublock - before.ru_oublock
    print(memory, blocks, str(error)[:999])
"""


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: getattr(bomb, "__name__", "no_room"))
def test_a_bomb_takes_neither_memory_nor_disk(
    tmp_path: Path, path: Path, members: Members, bomb: Callable[[Path, Members], str]
) -> None:
    said = bomb(path, members)
    assert path.stat().st_size < MIB
    store = Store.open(tmp_path / "home")
    before = state_of(store)
    done = subprocess.run(
        [sys.executable, "-c", _UNPACK, store.home, path],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 30, 2 << 30)),
    )
    kib, blocks, error = done.stdout.split(maxsplit=2)
    assert int(kib) < 128 << 10, "KiB of memory"
    assert int(blocks) < 16 << 10, "blocks of 512 bytes"
    assert re.search(said, error)
    assert state_of(store) == before
