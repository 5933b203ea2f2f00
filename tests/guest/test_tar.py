"""The tar format: what is written, any tar reads; what is read is that, and nothing else."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon.machine.guest.shared import tar

names = st.lists(
    st.binary(min_size=1, max_size=300)
    .map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"_"))
    .filter(lambda name: name not in (b".", b"..")),
    min_size=1,
    max_size=4,
).map(b"/".join)
numbers = st.integers(0, tar.MAX_ID)
times = st.integers(-(2**62), 2**62)


@st.composite
def entries(draw: st.DrawFn) -> tuple[tar.Entry, bytes]:
    kind = draw(st.sampled_from(sorted(tar.KINDS)))
    content = draw(st.binary(max_size=2000)) if kind == tar.FILE else b""
    entry = tar.Entry(
        draw(names),
        kind,
        size=len(content),
        mode=draw(st.integers(0, 0o7777)),
        uid=draw(numbers),
        gid=draw(numbers),
        mtime_ns=draw(times),
        target=draw(names) if kind in (tar.SYMLINK, tar.HARD_LINK) else b"",
    )
    return entry, content


def archive(*members: tuple[tar.Entry, bytes]) -> bytes:
    packed = (tar.encode(e) + content + tar.padding(len(content)) for e, content in members)
    return b"".join(packed) + tar.END


def fields(entry: tar.Entry) -> dict[str, object]:
    return {name: getattr(entry, name) for name in tar.Entry.__slots__}


def read(data: bytes, *, step: int | None = None) -> list[tuple[tar.Entry, bytes]]:
    """All that is in an archive, fed in pieces of `step` bytes; it must have an end."""
    reader = tar.Reader()
    found: list[tuple[tar.Entry, bytes]] = []
    step = step or len(data) or 1
    for start in range(0, len(data), step):
        for part in reader.feed(data[start : start + step]):
            if isinstance(part, tar.Entry):
                found.append((part, b""))
            else:
                entry, content = found.pop()
                found.append((entry, content + bytes(part)))
    assert reader.ended
    return found


@given(st.lists(entries(), max_size=5), st.integers(1, 3000))
def test_what_is_written_is_read(members: list[tuple[tar.Entry, bytes]], step: int) -> None:
    found = read(archive(*members), step=step)
    assert [(fields(e), content) for e, content in found] == [
        (fields(e), content) for e, content in members
    ]


@given(st.lists(entries(), max_size=5))
def test_what_is_written_the_standard_library_reads(
    members: list[tuple[tar.Entry, bytes]],
) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive(*members)), mode="r:") as opened:
        found = opened.getmembers()
        assert len(found) == len(members)
        for member, (entry, content) in zip(found, members, strict=True):
            assert member.name.encode("utf-8", "surrogateescape") == entry.name.rstrip(b"/")
            assert member.linkname.encode("utf-8", "surrogateescape") == entry.target
            assert (member.type, member.mode) == (entry.kind, entry.mode)
            assert (member.uid, member.gid, member.size) == (entry.uid, entry.gid, entry.size)
            assert abs(member.mtime - entry.mtime_ns / 1e9) <= abs(entry.mtime_ns / 1e9) * 1e-9
            file = opened.extractfile(member) if entry.kind == tar.FILE else None
            assert (file.read() if file else b"") == content


@pytest.mark.parametrize("size", [8**11 - 1, 8**11, 2**50])
def test_sizes_of_any_magnitude(size: int) -> None:
    header = tar.encode(tar.Entry(b"large", tar.FILE, size=size))
    (entry,) = tar.Reader().feed(header)
    assert isinstance(entry, tar.Entry)
    assert entry.size == size
    with tarfile.open(fileobj=io.BytesIO(header), mode="r|") as opened:
        member = opened.next()
        assert member is not None
        assert member.size == size


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_what_the_standard_library_writes_is_read(format: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=format) as opened:
        for name in ("short", "d" * 60 + "/" + "f" * 90):
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = 3, 1_700_000_000, 0o640
            opened.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "short"
        opened.addfile(link)
    found = read(buffer.getvalue())
    assert [(e.name, e.kind, e.mode, e.mtime_ns, content) for e, content in found[:2]] == [
        (b"short", tar.FILE, 0o640, 1_700_000_000 * 10**9, b"abc"),
        (b"d" * 60 + b"/" + b"f" * 90, tar.FILE, 0o640, 1_700_000_000 * 10**9, b"abc"),
    ]
    assert (found[2][0].kind, found[2][0].target) == (tar.SYMLINK, b"short")


# What is refused --------------------------------------------------------------------------------


@given(st.binary(min_size=512, max_size=3000))
def test_noise_is_refused(noise: bytes) -> None:
    if any(noise[:512]):
        with pytest.raises(tar.TarError):
            read(noise)


@given(entries(), st.data())
def test_a_header_that_was_changed_is_refused_or_says_something_else(
    member: tuple[tar.Entry, bytes], data: st.DataObject
) -> None:
    """No change of a byte makes the reader fail in another way, or hold more than it may."""
    whole = bytearray(archive(member))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] = data.draw(st.integers(0, 255))
    reader = tar.Reader()
    try:
        for _ in reader.feed(bytes(whole)):
            pass
    except tar.TarError:
        pass
    assert len(reader._header) <= tar.MAX_PAX


@pytest.mark.parametrize(
    "type",
    [
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.CONTTYPE,
        tarfile.GNUTYPE_SPARSE,
        b"Z",
    ],
)
def test_other_types_are_refused(type: bytes) -> None:
    member = tarfile.TarInfo("name")
    member.type = type
    with pytest.raises(tar.TarError, match="an entry of type"):
        read(member.tobuf(tarfile.USTAR_FORMAT))


def test_long_names_as_gnu_writes_them() -> None:
    link = tarfile.TarInfo("n" * 4000)
    link.type, link.linkname, link.mtime = tarfile.SYMTYPE, "t" * 4000, 1
    plain = tarfile.TarInfo("plain").tobuf(tarfile.GNU_FORMAT)
    found = read(link.tobuf(tarfile.GNU_FORMAT) + plain + tar.END)
    assert [(entry.name, entry.target) for entry, _ in found] == [
        (b"n" * 4000, b"t" * 4000),
        (b"plain", b""),
    ]


def test_notes_about_the_archive_are_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", pax_headers={"comment": "a commit"}) as opened:
        opened.addfile(tarfile.TarInfo("name"))
    assert [entry.name for entry, _ in read(buffer.getvalue())] == [b"name"]


def test_a_header_from_before_posix_is_refused() -> None:
    block = bytearray(FILE)
    block[257:265] = bytes(8)
    with pytest.raises(tar.TarError, match="no ustar header"):
        read(bytes(block))


def test_a_wrong_checksum_is_refused() -> None:
    block = bytearray(tar.encode(tar.Entry(b"name", tar.FILE))[-512:])
    block[0] += 1
    with pytest.raises(tar.TarError, match="checksum"):
        read(bytes(block))


def pax(records: bytes, *, size: int | None = None) -> bytes:
    member = tarfile.TarInfo("pax")
    member.type, member.size = tarfile.XHDTYPE, len(records) if size is None else size
    return member.tobuf(tarfile.USTAR_FORMAT) + records + tar.padding(len(records))


FILE = tar.encode(tar.Entry(b"file", tar.FILE))[-512:]


@pytest.mark.parametrize(
    "records",
    [
        b"9999 path=short\n",
        b"10 path=no\n\n",
        b"7 path\n\n",
        b"-5 path=a\n",
        b"0 path=a\n",
        b"11 size=-12\n",
        b"29 size=99999999999999999999\n",
        b"12 size=1e10\n",
        b"12 mtime=1:2\n",
        b"13 mtime=nan\n",
        b"18 uid=4294967295\n",
        b"12 path=a\0b\n",
        b"x",
    ],
)
def test_records_that_make_no_sense_are_refused(records: bytes) -> None:
    with pytest.raises(tar.TarError):
        read(pax(records) + FILE)


@pytest.mark.parametrize("size", [0, tar.MAX_PAX + 1, 8**11 - 1])
def test_a_pax_header_is_not_held_whatever_its_size(size: int) -> None:
    with pytest.raises(tar.TarError, match="about the next entry"):
        list(tar.Reader().feed(pax(b"", size=size)))


def test_no_more_is_heard_of_one_entry_than_there_is_to_say() -> None:
    one = pax(b"9 path=a\n")
    with pytest.raises(tar.TarError, match="about the next entry"):
        read(one * 4 + FILE)


@pytest.mark.parametrize(
    "after",
    [tar.END + FILE, bytes(512) + FILE, bytes(2 * 1024 * 1024), pax(b"9 path=a\n") + tar.END],
)
def test_what_goes_on_after_its_end_is_refused(after: bytes) -> None:
    with pytest.raises(tar.TarError, match="after its end"):
        read(FILE + after)


def test_padding_to_a_whole_record_is_read() -> None:
    assert len(read((FILE + tar.END).ljust(10240, b"\0"))) == 1
