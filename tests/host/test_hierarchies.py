"""Which hierarchies of control groups there are, from what the kernel says about mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratoon.machine.host.hierarchies import Hierarchy, hierarchies, parse, with_controller

V1 = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
"""
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = V1 + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")

TOP = Path("/sys/fs/cgroup")


def test_version_1_has_a_hierarchy_each() -> None:
    found = parse(V1, "3:cpu,cpuacct:/\n4:memory:/engines/one\n9:name=systemd:/\n")
    assert [(each.version, each.own) for each in found] == [
        (1, TOP / "cpu,cpuacct"),
        (1, TOP / "memory/engines/one"),
        (1, TOP / "systemd"),
    ]
    assert with_controller(found, "memory") == found[1]
    assert with_controller(found, "cpu") == found[0]
    assert with_controller(found, "pids") is None


def test_version_2_has_one_for_all() -> None:
    (found,) = parse(V2, "0::/user.slice/session-1.scope\n")
    own = TOP / "user.slice/session-1.scope"
    assert found == Hierarchy(2, frozenset(), TOP, own)


def test_a_hybrid_has_each_controller_where_it_is(tmp_path: Path) -> None:
    membership = "3:cpu,cpuacct:/\n4:memory:/\n9:name=systemd:/\n0::/\n"
    mounts = HYBRID.replace("/sys/fs/cgroup/unified", str(tmp_path))
    found = parse(mounts, membership)
    (tmp_path / "cgroup.controllers").write_text("pids\n")
    versions = {name: with_controller(found, name) for name in ("memory", "cpu", "pids", "io")}
    assert {name: each and each.version for name, each in versions.items()} == {
        "memory": 1,
        "cpu": 1,
        "pids": 2,
        "io": None,
    }


@pytest.mark.parametrize(
    ("root", "own", "found"),
    [
        ("/docker/abc", "/docker/abc", "."),
        ("/docker/abc", "/docker/abc/engine", "engine"),
        ("/docker/abc", "/docker/abcd", None),
        ("/docker/abc", "/", None),
        ("/", "/../elsewhere", None),
        ("/", "/a", "a"),
    ],
)
def test_a_part_of_a_hierarchy_may_be_mounted(root: str, own: str, found: str | None) -> None:
    mounts = f"30 23 0:26 {root} /mnt/my\\040groups rw - cgroup2 none rw\n"
    answer = [each.own for each in parse(mounts, f"0::{own}\n")]
    assert answer == ([] if found is None else [Path("/mnt/my groups") / found])


def test_one_that_is_mounted_twice_counts_once() -> None:
    found = parse(V2 + V2.replace("/sys/fs/cgroup", "/other"), "0::/\n")
    assert [each.top for each in found] == [TOP]


def test_one_without_a_mount_is_left_out() -> None:
    assert parse("", "4:memory:/\n0::/\n") == []


def test_this_host() -> None:
    for each in hierarchies():
        assert (each.own / "cgroup.procs").exists()
