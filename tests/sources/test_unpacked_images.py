"""What is on the disk of an image: the layers one upon the other, and what a runtime provides."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_looks import DISK, Look

from oci_images import Layout, directory, file, hard_link, layer, symlink
from ratoon.engine.sources.directory import Directory
from ratoon.engine.sources.image import Image
from ratoon.engine.sources.oci import OciImage
from ratoon.engine.sources.resolve import resolve, root_disk
from ratoon.engine.sources.trees import Tree
from ratoon.errors import Conflict, Corrupt, HostError, InvalidInput, NotFound
from ratoon.store.snapshot.image_config import ImageConfig

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

pytest_plugins = ["image_fixtures"]

#: `cap_net_bind_service=ep`, linux/capability.h: version 2, little-endian.
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
NAMES = ("proc", "sys", "dev", "run", "tmp", "etc")


def test_a_later_layer_hides_replaces_and_adds(look: Look, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add(
        [
            layer(
                [
                    *(directory("gone"), file("gone/inside"), file("lost"), file("kept", b"old")),
                    *(directory("opaque"), file("opaque/old"), directory("opaque/sub")),
                    *(file("was-file"), directory("was-directory"), file("was-directory/x")),
                    *(symlink("was-link", "kept"), directory("mode", 0o700)),
                ]
            ),
            layer(
                [
                    *(file(".wh.gone"), file(".wh.lost"), file("kept", b"new")),
                    *(file("opaque/.wh..wh..opq"), file("opaque/new")),
                    *(directory("was-file"), file("was-directory", b"file")),
                    *(file("was-link", b"no link"), directory("mode", 0o1777)),
                ]
            ),
        ]
    )
    root = look(layout.reference())
    assert {path.name for path in root.iterdir()} - {*NAMES, "lost+found"} == {
        *("kept", "opaque", "was-file", "was-directory", "was-link", "mode"),
    }
    assert [path.name for path in (root / "opaque").iterdir()] == ["new"]
    assert (root / "kept").read_bytes() == b"new"
    assert (root / "was-file").is_dir()
    assert (root / "was-directory").read_bytes() == b"file"
    assert (root / "was-link").read_bytes() == b"no link"
    assert stat.S_IMODE((root / "mode").stat().st_mode) == 0o1777


def test_links_owners_modes_times_and_attributes_are_kept(look: Look, tmp_path: Path) -> None:
    capability = CAPABILITY.decode("latin-1")
    layout = Layout(tmp_path / "layout")
    layout.add(
        [
            layer(
                [
                    file("owned", b"x", 0o640, uid=1234, gid=4321),
                    file("setuid", b"x", 0o4755),
                    hard_link("also-owned", "owned"),
                    symlink("absolute", "/owned"),
                    symlink("up", "../../../../etc/passwd"),
                    file("able", xattrs={"security.capability": capability, "user.note": "n"}),
                ]
            ),
            layer([hard_link("in-another-layer", "owned")]),
        ]
    )
    root = look(layout.reference())
    owned = (root / "owned").stat()
    assert (owned.st_uid, owned.st_gid, stat.S_IMODE(owned.st_mode)) == (1234, 4321, 0o640)
    assert (owned.st_mtime, owned.st_nlink) == (1_000_000_000, 3)
    for name in ("also-owned", "in-another-layer"):
        assert (root / name).stat().st_ino == owned.st_ino
    assert stat.S_IMODE((root / "setuid").stat().st_mode) == 0o4755
    assert (root / "absolute").readlink() == Path("/owned")
    assert (root / "up").readlink() == Path("../../../../etc/passwd")
    assert os.getxattr(root / "able", "security.capability") == CAPABILITY
    assert os.getxattr(root / "able", "user.note") == b"n"


def test_what_a_runtime_provides_is_there(look: Look, tmp_path: Path) -> None:
    """Also where the image has something else of that name, as hostile as it may be."""
    layout = Layout(tmp_path / "layout")
    layout.add([layer([file("only")])], ref="bare")
    layout.add(
        [
            layer(
                [
                    *(symlink("proc", "/"), file("sys"), symlink("dev", "nowhere")),
                    *(symlink("tmp", "/etc"), directory("etc"), directory("etc/hosts")),
                    *(symlink("etc/resolv.conf", "/run/elsewhere"), file("etc/hosts/x")),
                    symlink("etc/hostname", "../../../../../etc/hostname"),
                ]
            )
        ],
        ref="odd",
    )
    layout.add([layer([symlink("etc", "/tmp")])], ref="link")
    own = Path("/etc/hostname").read_bytes()
    for ref in ("bare", "odd", "link"):
        root = look(layout.reference(ref))
        for name in NAMES[:-1]:
            assert stat.S_ISDIR((root / name).lstat().st_mode)
        assert stat.S_IMODE((root / "tmp").lstat().st_mode) == 0o1777
        etc = root / "tmp" if ref == "link" else root / "etc"
        assert "localhost" in (etc / "hosts").read_text()
        assert (etc / "resolv.conf").read_text() == "nameserver 10.0.2.3\n"
        assert not (etc / "resolv.conf").is_symlink()
        assert (etc / "machine-id").read_bytes() == b""
    assert Path("/etc/hostname").read_bytes() == own


@pytest.mark.parametrize("suffix", ["", "+gzip", "+zstd"])
def test_layers_may_have_any_compression(suffix: str, look: Look, tmp_path: Path) -> None:
    compress: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        "+gzip": gzip.compress,
        "+zstd": zstd.compress,
    }
    layout = Layout(tmp_path / "layout")
    twice = layer([file("twice", b"2" * 10000)])
    layout.add([twice, layer([file("x")]), twice], suffix=suffix, compress=compress[suffix])
    assert (look(layout.reference()) / "twice").read_bytes() == b"2" * 10000


@pytest.mark.parametrize(
    "compress",
    [gzip.compress, bz2.compress, lzma.compress, zstd.compress],
    ids=["gzip", "bzip2", "xz", "zstd"],
)
def test_a_compressed_file_may_have_many_members(
    compress: Callable[[bytes], bytes], look: Look, tmp_path: Path
) -> None:
    """As parallel programs and lazily pulled images have them; empty ones too, and padding."""
    data = layer([file("x", b"x" * 100_000), file("y", os.urandom(300_000))])
    pieces = [compress(data[at : at + 7000]) for at in range(0, len(data), 7000)]
    packed = compress(b"").join(pieces) + (b"" if compress is bz2.compress else bytes(200_000))
    (tmp_path / "x.tar").write_bytes(packed)
    root = look(f"tar:{tmp_path}/x.tar")
    assert ((root / "x").stat().st_size, (root / "y").stat().st_size) == (100_000, 300_000)
    (tmp_path / "x.tar").write_bytes(packed.rstrip(b"\0")[:-5])
    with pytest.raises(Corrupt, match=r"x\.tar"):
        root_disk(resolve(f"tar:{tmp_path}/x.tar"), DISK)


def test_xz_takes_no_more_memory_than_it_is_worth(cache: Path, tmp_path: Path) -> None:
    """A dictionary of a gibibyte, which a few bytes can ask for: this header is made by hand."""
    plain = lzma.compress(layer([file("x")]), preset=0)
    size = (plain[12] + 1) * 4
    header = bytearray(plain[12 : 12 + size])
    at = header.index(b"\x21\x01") + 2  # the filter LZMA2, with properties of one byte
    header[at] = 36
    header[-4:] = zlib.crc32(header[:-4]).to_bytes(4, "little")
    (tmp_path / "x.tar").write_bytes(plain[:12] + header + plain[12 + size :])
    with pytest.raises(Corrupt, match=r"[Mm]emory"):
        root_disk(resolve(f"tar:{tmp_path}/x.tar"), DISK)


@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive"])
def test_archives(kind: str, look: Look, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add([layer([file("archived", b"here")])], {"Cmd": ["/archived"]})
    archive = tmp_path / "archive.tar"
    name = {"docker-archive": ":some/name:v1", "oci-archive": ":v1"}[kind]
    target = f"{kind}:{archive}{name}"
    subprocess.run(["skopeo", "copy", "--quiet", layout.reference(), target], check=True)
    for reference in (f"{kind}:{archive}", target):
        assert resolve(reference).config.command == ("/archived",)
    assert (look(f"{kind}:{archive}") / "archived").read_bytes() == b"here"


def test_a_layout_or_archive_that_was_changed_is_read_again(cache: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add([layer([file("x")])], {"Cmd": ["old"]}, ref="old")
    assert resolve(f"oci:{layout.path}").config.command == ("old",)
    shutil.rmtree(layout.path)
    layout = Layout(tmp_path / "layout")
    layout.add([layer([file("x")])], {"Cmd": ["new"]}, ref="new")
    assert resolve(f"oci:{layout.path}").config.command == ("new",)


def test_the_configuration_is_that_of_the_image(cache: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add(
        [layer([file("x")])],
        {
            "Env": ["A=1", "B=x=y", "EMPTY=", "no-value"],
            "User": "app:staff",
            "WorkingDir": "/srv",
            "Entrypoint": ["/entry", "-v"],
            "Cmd": ["serve"],
            "ExposedPorts": {"8080/tcp": {}, "53/udp": {}, "80": {}, "nonsense": {}},
            "StopSignal": "SIGINT",
            "Volumes": {"/data": {}},
        },
    )
    config = resolve(layout.reference()).config
    assert config == ImageConfig(
        env={"A": "1", "B": "x=y", "EMPTY": ""},
        user="app:staff",
        workdir="/srv",
        entrypoint=("/entry", "-v"),
        command=("serve",),
        exposed_ports=(80, 8080),
        stop_signal="SIGINT",
    )
    assert config.argv() == ["/entry", "-v", "serve"]
    assert config.argv(["other", "-x"]) == ["/entry", "-v", "other", "-x"]
    assert config.argv([], ["/bin/sh"]) == ["/bin/sh"]
    assert config.argv(["-c", "true"], ["/bin/sh"]) == ["/bin/sh", "-c", "true"]
    assert config.argv(["/bin/true"], []) == ["/bin/true"]
    layout.add([layer([file("x")])], ref="none")
    assert resolve(layout.reference("none")).config == ImageConfig()


@pytest.mark.parametrize(
    "config", [{"Env": ["A=\0"]}, {"Cmd": "text"}, {"User": 7}, {"Env": {}}, {"Cmd": ["\0"]}]
)
def test_a_configuration_that_makes_no_sense_is_refused(
    config: dict[str, object], cache: Path, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add([layer([file("x")])], config)
    with pytest.raises((InvalidInput, HostError), match=str(layout.path)):
        resolve(layout.reference())


# Tarballs and directories -------------------------------------------------------------------------


def make_tree(root: Path) -> None:
    (root / "sub").mkdir(parents=True)
    (root / "file").write_bytes(b"content")
    os.chown(root / "file", 77, 88)
    os.link(root / "file", root / "sub/hard")
    (root / "soft").symlink_to("/file")
    os.mkfifo(root / "fifo")
    os.setxattr(root / "file", "security.capability", CAPABILITY)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))


def check_tree(root: Path) -> None:
    status = (root / "file").stat()
    assert (status.st_uid, status.st_gid, status.st_nlink) == (77, 88, 2)
    assert (root / "sub/hard").stat().st_ino == status.st_ino
    assert (root / "soft").readlink() == Path("/file")
    assert stat.S_ISFIFO((root / "fifo").stat().st_mode)
    assert (root / "null").stat().st_rdev == os.makedev(1, 3)
    assert os.getxattr(root / "file", "security.capability") == CAPABILITY
    assert (root / "etc/hosts").is_file()


@pytest.mark.parametrize(
    "compress",
    [bytes, gzip.compress, bz2.compress, lzma.compress, zstd.compress],
    ids=["plain", "gzip", "bzip2", "xz", "zstd"],
)
def test_a_tarball(compress: Callable[[bytes], bytes], look: Look, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    pack = [
        "tar",
        "--xattrs",
        "--xattrs-include=*",
        "--numeric-owner",
        "-C",
        str(tmp_path / "tree"),
    ]
    packed = subprocess.run([*pack, "-c", "."], check=True, capture_output=True).stdout
    (tmp_path / "root.tar").write_bytes(compress(packed))
    check_tree(look(f"tar:{tmp_path}/root.tar"))


def test_a_directory(look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path / "tree")
    monkeypatch.chdir(tmp_path)
    assert resolve("dir:tree").name == f"dir:{tmp_path}/tree"
    check_tree(look("dir:tree"))
    before = resolve("dir:tree").digest
    assert resolve("dir:tree").digest == before
    (tmp_path / "tree/sub/new").touch()
    assert resolve("dir:tree").digest != before


def test_a_tree_that_changes_meanwhile_is_not_taken_for_the_other(
    cache: Path, tmp_path: Path
) -> None:
    make_tree(tmp_path / "tree")
    image = resolve(f"dir:{tmp_path}/tree")
    (tmp_path / "tree/file").write_bytes(b"changed")
    with pytest.raises(Conflict, match="was changed"):
        root_disk(image, DISK)
    tarball = tmp_path / "root.tar"
    tarball.write_bytes(layer([file("x")]))
    for other in (layer([file("y")]), b"no archive at all"):
        image = resolve(f"tar:{tarball}")
        tarball.write_bytes(other)
        with pytest.raises(Conflict, match="was changed"):
            root_disk(image, DISK)


@pytest.mark.parametrize("change", ["file", "sub/hard", "soft", "sub"])
def test_a_tree_that_changes_while_it_is_read(
    change: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is gone between the first look and the second."""
    from ratoon.engine.sources import trees

    class Changing(Directory):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            subprocess.run(["rm", "-r", tmp_path / "tree" / change], check=True)

    make_tree(tmp_path / "tree")
    image = resolve(f"dir:{tmp_path}/tree")
    monkeypatch.setattr(trees, "Directory", Changing)
    with pytest.raises(Conflict, match="was changed"):
        root_disk(image, DISK)


@pytest.mark.parametrize("data", [b"\x1f\x8bnonsense", b"BZhno", b"\x28\xb5\x2f\xfdno"])
def test_what_is_no_tarball_is_refused(data: bytes, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "no.tar").write_bytes(data)
    with pytest.raises((Corrupt, HostError), match=r"no\.tar"):
        root_disk(resolve(f"tar:{tmp_path}/no.tar"), DISK)


@pytest.mark.parametrize("data", [b"root:x:0:0:root:/root:/bin/bash\n", b"?" * 5120, b""])
def test_what_is_no_archive_is_the_fault_of_who_named_it(
    data: bytes, cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "passwd"
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match=f"{path} is no tar archive"):
        root_disk(resolve(f"tar:{path}"), DISK)
    if data:
        for kind in ("docker-archive", "oci-archive"):
            with pytest.raises(InvalidInput, match=f"^{path} is no {kind}: .*{path}"):
                resolve(f"{kind}:{path}")


@pytest.mark.parametrize("kind", ["oci", "docker-archive", "oci-archive"])
def test_an_image_that_is_not_in_there_is_not_found(kind: str, cache: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "oci")
    layout.add([layer([file("x")])])
    if kind != "oci":
        target = f"{kind}:{tmp_path}/{kind}:there:v1"
        subprocess.run(["skopeo", "copy", "--quiet", layout.reference(), target], check=True)
    with pytest.raises(NotFound) as caught:
        resolve(f"{kind}:{tmp_path}/{kind}:absent")
    assert f"no image {kind}:{tmp_path}/{kind}:absent: " in str(caught.value)
    assert "/proc/" not in str(caught.value)


def test_a_truncated_tarball_is_refused(cache: Path, tmp_path: Path) -> None:
    whole = gzip.compress(layer([file("x", os.urandom(100_000))]))
    (tmp_path / "part.tar").write_bytes(whole[:-5000])
    with pytest.raises((Corrupt, HostError), match=r"part\.tar"):
        root_disk(resolve(f"tar:{tmp_path}/part.tar"), DISK)


# Where they may lie -------------------------------------------------------------------------------


def local_references(place: Path) -> list[str]:
    """An image of each kind in the directory `place`, which is made."""
    layout = Layout(place / "layout")
    layout.add([layer([file("x")])])
    for kind in ("docker-archive", "oci-archive"):
        target = f"{kind}:{place}/{kind}"
        subprocess.run(["skopeo", "copy", "-q", layout.reference(), target], check=True)
    (place / "root.tar").write_bytes(layer([file("x")]))
    archives = [f"{kind}:{place}/{kind}" for kind in ("docker-archive", "oci-archive")]
    return [layout.reference(), *archives, f"tar:{place}/root.tar", f"dir:{place}"]


def test_images_of_the_host_are_taken_from_where_they_may_lie(cache: Path, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    taken, others = local_references(inside), local_references(outside)
    for reference, other in zip(taken, others, strict=True):
        assert resolve(reference, roots=[inside]).digest
        with pytest.raises(InvalidInput, match="is not below"):
            resolve(other, roots=[inside])
        with pytest.raises(InvalidInput, match="--image-root"):
            resolve(reference, roots=[])  # though it was found before
        assert root_disk(resolve(reference), DISK, roots=[inside]).exists()
    (inside / "way-out").symlink_to(outside)
    with pytest.raises(InvalidInput, match="is not below"):
        resolve(f"oci:{inside}/way-out/layout:latest", roots=[inside])
    with pytest.raises(InvalidInput, match="is not below"):
        resolve(f"dir:{inside}/../outside", roots=[inside])


@pytest.mark.parametrize("reference", ["oci:", "tar:", "dir:", "docker-archive:", "oci-archive:"])
def test_a_path_is_needed_and_must_be_there(reference: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="names no path"):
        resolve(reference)
    with pytest.raises(InvalidInput, match=r"absent cannot be read: No such file"):
        resolve(f"{reference}{tmp_path}/absent")
    (tmp_path / "fifo").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidInput, match="is not a"):
        resolve(f"{reference}{tmp_path}/fifo")


def test_other_names_are_not_those_of_files() -> None:
    for name in ("debian", "debian:trixie+git", "oci", "x/dir:tag", "dirs:x"):
        assert OciImage.on_host(name) is None
        assert Tree.parse(name) is None


def test_the_name_of_an_image_says_where_it_lies(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(layer([file("x")]))
    image = resolve(f"tar:{tmp_path}/x.tar")
    assert image == Image(f"tar:{tmp_path}/x.tar", image.digest, ImageConfig())
    assert image.digest.startswith("blake3:")


def test_a_tarball_may_be_as_tar_makes_it(look: Look, tmp_path: Path) -> None:
    """GNU tar's own format, with a long name and a sparse file."""
    tree = tmp_path / "tree"
    long = tree / ("d" * 120) / ("f" * 120)
    long.parent.mkdir(parents=True)
    long.write_bytes(b"long")
    with (tree / "sparse").open("wb") as sparse:
        sparse.truncate(8 * 1024 * 1024)
        sparse.seek(4 * 1024 * 1024)
        sparse.write(b"middle")
    command = ["tar", "--format=gnu", "--sparse", "-C", str(tree), "-c", "."]
    packed = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert archive.getmember("./sparse").issparse()
    (tmp_path / "gnu.tar").write_bytes(packed)
    root = look(f"tar:{tmp_path}/gnu.tar")
    assert (root / long.relative_to(tree)).read_bytes() == b"long"
    assert (root / "sparse").read_bytes() == (tree / "sparse").read_bytes()
