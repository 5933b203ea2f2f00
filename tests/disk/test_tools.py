"""What the programs have that read and write disks."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from disk_tools import scripts
from ratoon.errors import HostError
from ratoon.jail.user_namespace import free_ids
from ratoon.store.disk.ext4 import Ext4
from ratoon.store.disk.flatten import allocated_above, flatten, flatten_raw, from_raw, merge
from ratoon.store.disk.qcow2 import OverlayTemplates, check_header
from ratoon.store.disk.tools import PROGRAMS, tool
from ratoon.store.disk.tree import read_tree
from small_snapshots import make_layer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make cells")

MIB = 1 << 20
#: Tells of itself on its standard error, and fails.
TELL = """exec >&2
busybox id -u
busybox grep -e CapEff -e NoNewPrivs -e Seccomp: /proc/self/status
busybox find / -type f | busybox grep -v -e /lib -e /usr -e {directory} | busybox sort
for f in /files/*; do (: >>$f) && echo "writes $f"; done
echo "$@"
exit 9"""


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    made = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / "disk.qcow2"
        made.append(make_layer(path, f"write -P {number + 1} {number * 64}k 64k"))
        path.chmod(0o400)
    return made


def told(tmp_path: Path, failure: pytest.ExceptionInfo[HostError]) -> list[str]:
    _, *lines = str(failure.value).splitlines()
    return [line for line in lines if "can't create" not in line]


def test_what_it_has(tmp_path: Path, layers: list[Path]) -> None:
    """A user of its own, its layers to be read, its target to be written, and no file besides."""
    script = scripts(tmp_path, {"qemu-img": TELL.format(directory=tmp_path)})
    with script, pytest.raises(HostError, match="qemu-img failed with exit code 9") as failure:
        flatten_raw(layers[:2], tmp_path / "raw")
    uid, *lines, arguments = told(tmp_path, failure)
    assert int(uid) in free_ids()
    assert lines == [
        "grep: /proc/self/status: No such file or directory",
        *("/etc/mke2fs.conf", "/files/0", "/files/1", "/files/2"),
        "writes /files/2",
    ]
    assert re.findall(r"/files/\d|convert|raw", arguments) == [
        *("convert", "raw", "/files/1", "/files/0", "/files/2"),
    ]
    assert not (tmp_path / "raw").exists()
    assert {path.stat().st_uid for path in layers} == {0}


def test_a_disk_that_names_a_layer_which_it_was_not_given(
    tmp_path: Path, layers: list[Path]
) -> None:
    """As one does that was made to have QEMU open other files."""
    layers[1].chmod(0o600)
    command = ["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", str(layers[2]), str(layers[1])]
    subprocess.run(command, check=True)
    with tool("qemu-img", MIB) as qemu_img:
        name = qemu_img.reads(layers[1])
        with pytest.raises(HostError, match=f"{layers[2]}.*No such file or directory"):
            qemu_img.run("convert", "-O", "raw", name, "/files/1")


def test_owners_are_as_they_were(tmp_path: Path, layers: list[Path]) -> None:
    """Of all that the programs write."""
    made = [tmp_path / name for name in ("raw", "flat", "merged", "from raw", "empty")]
    raw, flat, merged, back, empty = made
    flatten_raw(layers, raw)
    flatten(layers, flat)
    merge(layers[:1], layers[1:], merged)
    from_raw(raw, back)
    OverlayTemplates(tmp_path).create(empty, MIB)
    assert {(path.stat().st_uid, path.stat().st_gid) for path in (*made, *layers)} == {(0, 0)}
    assert {path.stat().st_mode & 0o222 for path in layers} == {0}
    assert {path.stat().st_mode & 0o777 for path in (raw, back)} == {0o600}
    flatten_raw([back], tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == raw.read_bytes()
    assert check_header(back, label="back").virtual_size == MIB


def test_a_failure_gives_back_what_it_had(tmp_path: Path, layers: list[Path]) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"x" * MIB)
    script = scripts(tmp_path, {"qemu-img": "busybox chmod 777 /files/*; exit 1"})
    with script, pytest.raises(HostError, match="qemu-img failed"):
        from_raw(raw, tmp_path / "disk")
    assert not (tmp_path / "disk").exists()
    assert (raw.stat().st_uid, raw.stat().st_mode & 0o777) == (0, 0o644)


@pytest.mark.parametrize("answer", ["", "[{]", '[{"start": -1, "length": "x", "depth": 0}]'])
def test_nonsense_is_not_believed(tmp_path: Path, layers: list[Path], answer: str) -> None:
    script = scripts(tmp_path, {"qemu-img": f"echo '{answer}'"})
    with script, pytest.raises(HostError, match="qemu-img lists no extents"):
        allocated_above(layers, 0)


def test_a_file_system_from_a_tarball(tmp_path: Path) -> None:
    """Which mke2fs reads by a library that it loads when it is asked for one."""
    raw = tmp_path / "raw"
    raw.touch(0o600)
    os.truncate(raw, 16 * MIB)

    def feed(fd: int) -> None:
        with os.fdopen(fd, "wb", closefd=False) as pipe, tarfile.open(None, "w|", pipe) as archive:
            for name in ("plain", "nämlich-ジ"):
                archive.addfile(tarfile.TarInfo(name))

    with tool("mke2fs", 16 * MIB) as mke2fs:
        mke2fs.run("-q", "-F", "-t", "ext4", "-d", "-", mke2fs.writes(raw), feed=feed)
    with Ext4(raw, "the disk") as system:
        assert {b"plain", "nämlich-ジ".encode()} <= {*read_tree(system)}


def test_all_of_them_run(tmp_path: Path) -> None:
    for name in PROGRAMS:
        with tool(name, MIB) as program:
            program.run("--version" if name == "qemu-img" else "-V")
