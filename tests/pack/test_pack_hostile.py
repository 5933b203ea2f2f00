"""Packs that are damaged or forged: each is refused by name, and leaves nothing."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
from ratoon.errors import ChainMismatch, Corrupt, Incompatible, InvalidInput, RatoonError
from ratoon.store.pack.pack import pack
from ratoon.store.pack.packfile import tar_header
from ratoon.store.pack.unpack import unpack
from ratoon.store.snapshot.store import Store
from ratoon.units import MIB
from small_snapshots import digest

#: Where the data of the head's memory layer ends.
END = 4096 * (1 + 2)

Refuse = Callable[[Path, type[RatoonError], str | None], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A pack of L2, the head of base, L1, L2."""
    directory = tmp_path_factory.mktemp("sound")
    store = Store.open(directory / "home")
    publish_chain(store)
    return pack(store, "L2", directory / "pack").path.read_bytes()


@pytest.fixture
def path(tmp_path: Path, sound: bytes) -> Path:
    path = tmp_path / "pack"
    path.write_bytes(sound)
    return path


@pytest.fixture
def members(path: Path) -> Members:
    return members_of(path)


@pytest.fixture
def refuse(tmp_path: Path) -> Refuse:
    """Asserts that a pack is refused, with what, and that the store is as it was."""
    store = Store.open(tmp_path / "home")

    def refuse(path: Path, error: type[RatoonError], match: str | None) -> None:
        before = state_of(store)
        with pytest.raises(error, match=match) as caught:
            unpack(store, path)
        assert type(caught.value) is error
        assert str(path) in str(caught.value) or error is ChainMismatch
        assert state_of(store) == before

    return refuse


def test_what_the_helpers_put_together_is_sound(
    tmp_path: Path, path: Path, members: Members
) -> None:
    """Or else the tests below would show nothing."""
    for number, changed in enumerate(
        (members, sealed(members), with_files(members, {"vmstate": b"other"}))
    ):
        write_pack(path, archive_of(changed))
        unpack(Store.open(tmp_path / f"home{number}"), path)


# Names and kinds of members --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "ancestry/0/../../evil", "ancestry/00/x", "MEMORY.BIN", ""]
)
def test_other_names_than_a_packs(path: Path, members: Members, refuse: Refuse, name: str) -> None:
    renamed = {name if old == "memory.bin" else old: raw for old, raw in members.items()}
    write_pack(path, archive_of(sealed(renamed)))
    refuse(path, Corrupt, "pack.json lists .* where memory.bin must be")
    write_pack(path, archive_of({**renamed, "pack.json": members["pack.json"]}))
    refuse(path, Corrupt, "a member .* where memory.bin must be")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (b"1", "a link"),
        (b"2", "a link"),
        (b"3", "a device"),
        (b"4", "a device"),
        (b"5", "a directory"),
        (b"6", "a member"),  # a fifo
        (b"S", "a member"),  # GNU: a sparse file
        (b"L", "a member"),  # GNU: a long name follows
        (b"x", "a member"),  # POSIX: attributes follow
        (b"\0", "a member"),  # an older regular file
    ],
)
def test_other_kinds_than_files(
    path: Path, members: Members, refuse: Refuse, kind: bytes, said: str
) -> None:
    for name in ("memory.bin", "ancestry/0/disk.qcow2", "manifest.json"):
        header = bytearray(tar_header(name, len(members[name])))
        header[156:157] = kind
        header[157:168] = b"/etc/passwd"
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        archive = archive_of(members).replace(tar_header(name, len(members[name])), bytes(header))
        write_pack(path, archive)
        refuse(path, Corrupt, f"{said} '{name}' where {name} must be, a regular file")


@pytest.mark.parametrize("field", range(100, 512, 13))
def test_any_other_byte_in_a_header(
    path: Path, members: Members, refuse: Refuse, field: int
) -> None:
    """Owner, mode, time, prefix: a place to hide things, or for two readers to differ."""
    header = bytearray(tar_header("vmstate", len(members["vmstate"])))
    sound = bytes(header)
    header[field] ^= 1
    write_pack(path, archive_of(members).replace(sound, bytes(header)))
    refuse(path, Corrupt, "'vmstate' where vmstate must be")


def test_members_in_another_order_twice_or_too_many(
    path: Path, members: Members, refuse: Refuse
) -> None:
    pairs = [*members.items()]
    write_pack(path, archive_of([pairs[0], *reversed(pairs[1:])]))
    refuse(path, Corrupt, "'disk.qcow2' where manifest.json must be")
    for extra in (("disk.qcow2", members["disk.qcow2"]), ("evil", b"x")):
        write_pack(path, archive_of([*pairs, extra]))
        refuse(path, Corrupt, f"a member '{extra[0]}' after the last of its files")
    write_pack(path, archive_of([*pairs[:4], ("vmstate", b"again"), *pairs[4:]]))
    refuse(path, Corrupt, "'vmstate' where ancestry/0/memory.bin must be")


def test_members_that_are_missing(path: Path, members: Members, refuse: Refuse) -> None:
    for name in [*members][1:]:
        without = [(other, raw) for other, raw in members.items() if other != name]
        write_pack(path, archive_of(without))
        refuse(path, Corrupt, f"where {name} must be")
    write_pack(path, archive_of({**members, "pack.json": b""}))
    refuse(path, Corrupt, "pack.json is not JSON")
    write_pack(path, bytes(1024))
    refuse(path, Corrupt, "does not begin with pack.json")


# Documents -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "error", "said"),
    [
        (b"", Corrupt, "not JSON"),
        (b"[]", Corrupt, "names no format"),
        (b'{"format": true}', Corrupt, "names no format"),
        (b'{"format": "1"}', Corrupt, "names no format"),
        (b'{"format": 2}', Incompatible, "pack format 2, .* format 1"),
        (b'{"format": 0}', Incompatible, "pack format 0, .* format 1"),
        (b'{"format": 1}', Corrupt, "tag"),
        (b"[" * 100_000, Corrupt, "not JSON"),
        (b'{"format": 1' + b"0" * 5000 + b"}", Corrupt, "pack.json"),
        (b"\xff\xfe", Corrupt, "not JSON"),
        (b'"\\ud800"', Corrupt, "not JSON"),
    ],
)
def test_contents_that_are_none(
    path: Path,
    members: Members,
    refuse: Refuse,
    document: bytes,
    error: type[RatoonError],
    said: str,
) -> None:
    write_pack(path, archive_of({**members, "pack.json": document}))
    refuse(path, error, said)


@pytest.mark.parametrize(
    "changes",
    [
        {"tag": "../evil"},
        {"tag": ""},
        {"tag": 1},
        {"tag": "other"},
        {"files": []},
        {"files": None},
        {"more": 1},
    ],
)
def test_contents_that_are_wrong(
    path: Path, members: Members, refuse: Refuse, changes: dict[str, Any]
) -> None:
    write_pack(path, archive_of(sealed(members, **changes)))
    refuse(path, Corrupt, "pack.json")


@pytest.mark.parametrize("change", [{"size": -1}, {"size": 1 << 63}, {"digest": "0"}, {"x": 1}])
def test_files_that_cannot_be(
    path: Path, members: Members, refuse: Refuse, change: dict[str, Any]
) -> None:
    contents = json.loads(members["pack.json"])
    contents["files"][5].update(change)
    write_pack(path, archive_of({**members, "pack.json": json.dumps(contents).encode()}))
    refuse(path, Corrupt, r"pack.json: files\.5\.")


def test_digests_and_sizes_that_the_files_do_not_have(
    path: Path, members: Members, refuse: Refuse
) -> None:
    for number, name in enumerate([*members][1:]):
        contents = json.loads(members["pack.json"])
        assert contents["files"][number]["name"] == name
        contents["files"][number]["digest"] = "0" * 64
        raw = json.dumps(contents).encode()
        write_pack(path, archive_of({**members, "pack.json": raw}))
        refuse(path, Corrupt, name.replace(".", r"\."))
        contents["files"][number]["size"] += 512
        raw = json.dumps(contents).encode()
        write_pack(path, archive_of({**members, "pack.json": raw}))
        refuse(path, Corrupt, name.replace(".", r"\."))


def test_a_flipped_byte_in_any_file(path: Path, members: Members, refuse: Refuse) -> None:
    for name in [*members][1:]:
        raw = bytearray(members[name])
        raw[len(raw) // 2] ^= 1
        write_pack(path, archive_of({**members, name: bytes(raw)}))
        refuse(path, Corrupt, name.replace(".", r"\."))


def test_a_signature_has_its_place_but_cannot_be_checked_yet(
    tmp_path: Path, path: Path, members: Members, refuse: Refuse
) -> None:
    contents = members.pop("pack.json")
    write_pack(path, archive_of({"pack.json": contents, "pack.sig": b"x" * 64, **members}))
    refuse(path, Incompatible, "it is signed")
    write_pack(path, archive_of([("pack.json", contents), *members.items(), ("pack.sig", b"")]))
    refuse(path, Corrupt, "'pack.sig' after the last")
    write_pack(path, archive_of({"pack.json": contents, "pack.sig": b"", **members}))
    unpack(Store.open(tmp_path / "other"), path)


@pytest.mark.parametrize(
    ("where", "value", "error"),
    [
        (("format",), 3, Incompatible),
        (("format",), None, Corrupt),
        (("tag",), "other", Corrupt),
        (("tag",), "../evil", Corrupt),
        (("id",), "0" * 32, Corrupt),
        (("parent",), None, Corrupt),
        (("layers",), [], Corrupt),
        (("disk_root",), "0" * 64, Corrupt),
        (("memory_root",), "0" * 64, Corrupt),
        (("parent", "memory_root"), "0" * 64, ChainMismatch),
        (("layers", 0, "memory_root"), "0" * 64, ChainMismatch),
        (("layers", 0, "memory", "index_digest"), "0" * 64, Corrupt),
        (("layers", 0, "memory", "entries"), 1, Corrupt),
        (("layers", 1, "memory", "stored"), 1, Corrupt),
        (("layers", 2, "memory", "size"), 1, Corrupt),
        (("layers", 1, "disk", "size"), 1, Corrupt),
        (("vmstate", "size"), 1, Corrupt),
        (("vmstate", "digest"), "0" * 64, Corrupt),
        (("machine", "ram_bytes"), 1 << 21, Corrupt),
        (("machine", "ram_bytes"), (1 << 62), Incompatible),
        (("machine", "ram_bytes"), (1 << 63) - 4096, Incompatible),
        (("machine", "ram_bytes"), 4095, Corrupt),
        (("machine", "accelerator"), "kvm,evil", Corrupt),
        (("evil",), 1, Corrupt),
    ],
)
def test_a_forged_manifest(
    path: Path,
    members: Members,
    refuse: Refuse,
    where: tuple[str | int, ...],
    value: Any,
    error: type[RatoonError],
) -> None:
    document = json.loads(members["manifest.json"])
    place: Any = document
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    write_pack(path, archive_of(with_manifest(members, document)))
    refuse(path, error, None)


def test_a_manifest_digest_that_is_not_one(path: Path, members: Members, refuse: Refuse) -> None:
    for content in (b"", b"0" * 64 + b"\n", members["manifest.b3"].strip(), bytes(65)):
        write_pack(path, archive_of(sealed({**members, "manifest.b3": content})))
        refuse(path, Corrupt, "manifest.b3")


# Layers ----------------------------------------------------------------------------------------


def with_memory(members: Members, layer: int, raw: bytes) -> Members:
    """Another memory layer, whose maker has made the index digest fit."""
    document = json.loads(members["manifest.json"])
    reference = document["layers"][layer]["memory"]
    stored = int.from_bytes(raw[32:40], "little")
    index = raw[:4096] + raw[4096 * (1 + stored) :]
    reference |= {"index_digest": digest(index), "size": len(raw)}
    name = "memory.bin" if layer == 2 else f"ancestry/{layer}/memory.bin"
    return with_manifest({**members, name: raw}, document)


def flipped(raw: bytes, at: int) -> bytes:
    changed = bytearray(raw)
    changed[at] ^= 1
    return bytes(changed)


def swapped(raw: bytes, at: int, size: int) -> bytes:
    """The two words from `at` on have changed places."""
    middle, end = at + size, at + 2 * size
    return raw[:at] + raw[middle:end] + raw[at:middle] + raw[end:]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda raw: flipped(raw, END - 1), Corrupt, "page 255 does not match its digest"),
        (lambda raw: flipped(raw, 0), Corrupt, "not a page set"),
        (lambda raw: flipped(raw, 8), Incompatible, "version 3"),
        (lambda raw: flipped(raw, 16), Corrupt, "its counts"),
        (lambda raw: flipped(raw, 24), Corrupt, "bytes long"),
        (lambda raw: flipped(raw, END + 9), Corrupt, "beyond the 256 pages"),
        (lambda raw: flipped(raw, 4095), Corrupt, "padding"),
        (lambda raw: swapped(raw, END, 8), Corrupt, "not in order"),
        (lambda raw: flipped(raw, END), ChainMismatch, "chain link L2"),
        (lambda raw: raw[:-4096], Corrupt, "bytes long"),
        (lambda raw: raw + bytes(4096), Corrupt, "bytes long"),
        (lambda raw: raw[:10], Corrupt, "memory.bin"),
        (lambda raw: b"", Corrupt, "memory.bin"),
    ],
)
def test_a_forged_memory_layer(
    path: Path,
    members: Members,
    refuse: Refuse,
    change: Callable[[bytes], bytes],
    error: type[RatoonError],
    said: str,
) -> None:
    raw = change(members["memory.bin"])
    write_pack(path, archive_of(with_memory(members, 2, raw)))
    refuse(path, error, said)


def test_a_layer_of_another_chain(path: Path, members: Members, refuse: Refuse) -> None:
    write_pack(path, archive_of(with_memory(members, 1, members["memory.bin"])))
    refuse(path, Corrupt, "ancestry/1/memory.bin: its counts")


@pytest.mark.parametrize("name", ["disk.qcow2", "ancestry/0/disk.qcow2", "ancestry/1/disk.qcow2"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-b", "/etc/passwd", "-F", "raw", "-u"], "names a backing file"),
        (["-b", "json:{}", "-F", "raw", "-u"], "names a backing file"),
        (["-o", "data_file=outside.raw"], "names an external data file"),
    ],
)
def test_a_disk_that_names_another_file(
    tmp_path: Path,
    path: Path,
    members: Members,
    refuse: Refuse,
    name: str,
    options: list[str],
    said: str,
) -> None:
    disk = tmp_path / "disk"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(disk), "1M"]
    subprocess.run(command, check=True, cwd=tmp_path)
    write_pack(path, archive_of(with_files(members, {name: disk.read_bytes()})))
    refuse(path, InvalidInput, f"{name}: its header {said}")


@pytest.mark.parametrize("disk", [b"", b"raw" * 1000, bytes(1 << 20)])
def test_a_disk_that_is_none(path: Path, members: Members, refuse: Refuse, disk: bytes) -> None:
    write_pack(path, archive_of(with_files(members, {"disk.qcow2": disk})))
    refuse(path, InvalidInput, "disk.qcow2: not a qcow2 file")


# The file as a whole ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, -1, -3, -5])
def test_a_file_that_is_cut_short(path: Path, sound: bytes, refuse: Refuse, part: float) -> None:
    path.write_bytes(sound[: int(len(sound) * part) if part >= 0 else int(part)])
    refuse(path, Corrupt, "cut short")


def test_an_archive_that_is_cut_short(path: Path, members: Members, refuse: Refuse) -> None:
    archive = archive_of(members)
    for end in (0, 1, 511, 512, 1000, 10_000, len(archive) // 2, -1024, -512, -1):
        write_pack(path, archive[:end])
        refuse(path, Corrupt, "the archive ends in the middle")


def test_something_after_the_end(
    path: Path, sound: bytes, members: Members, refuse: Refuse
) -> None:
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    for more in (b"\0", b"more", sound, skippable, zstd.compress(b"")):
        path.write_bytes(sound + more)
        refuse(path, Corrupt, "the file goes on after the end of the archive")
    path.write_bytes(skippable + sound)
    refuse(path, Corrupt, "the archive ends in the middle")
    for more in (b"\0", bytes(512), bytes(10 * MIB), member("evil", b"x")):
        write_pack(path, archive_of(members) + more)
        refuse(path, Corrupt, "the archive goes on after its end")


def test_something_hidden_between_the_files(path: Path, members: Members, refuse: Refuse) -> None:
    for name in ("pack.json", "vmstate"):
        hidden = bytearray(member(name, members[name]))
        hidden[-1] = 1
        archive = archive_of(members).replace(member(name, members[name]), bytes(hidden))
        write_pack(path, archive)
        refuse(path, Corrupt, f"hidden behind {name}")


def test_other_files_than_packs(path: Path, refuse: Refuse) -> None:
    for raw in (b"", b"\0", b"PK\x03\x04" * 100, b"hello", bytes(5000)):
        path.write_bytes(raw)
        refuse(path, Corrupt, "not a pack|cut short")
    write_pack(path, b"hello" * 1000)
    refuse(path, Corrupt, "does not begin with pack.json")
