"""QEMU's command line, word by word."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ratoon.machine.vmm import command
from ratoon.machine.vmm.driver import Boot, Hardware, Launch
from ratoon.machine.vmm.given_files import ByPath, GivenFiles

LAUNCH = Launch(
    name="sb-1",
    hardware=Hardware(ram_bytes=512 * 1024 * 1024, vcpus=2, accelerator="tcg", cpu="max"),
    memory=Path("/images/root.ram"),
    disks=(Path("/s/ancestry/0/disk.qcow2"), Path("/s/ancestry/1/disk.qcow2"), Path("/s/d.qcow2")),
    overlay=Path("/sandboxes/sb-1/disk.qcow2"),
    log=Path("/sandboxes/sb-1/log"),
    runtime=Path("/run/ratoon/sb-1"),
)
BOOT = Boot(Path("/guest/vmlinuz"), Path("/guest/initramfs"), "console=ttyS0 quiet, really")


def words(launch: Launch = LAUNCH) -> list[str]:
    return command.arguments(launch, ByPath(), qmp_fd=7, agent_fd=9, volumes_fd=10)


def values(option: str, launch: Launch = LAUNCH) -> list[str]:
    line = words(launch)
    return [line[i + 1] for i, word in enumerate(line) if word == option]


def nodes(launch: Launch = LAUNCH) -> list[dict[str, Any]]:
    return [json.loads(value) for value in values("-blockdev", launch)]


def test_a_restored_machine_waits_and_is_told_no_kernel() -> None:
    line = words()
    assert line[-3:] == ["-S", "-incoming", "defer"]
    assert not {"-kernel", "-initrd", "-append"} & set(line)


def test_a_booted_machine_starts_at_once() -> None:
    line = words(replace(LAUNCH, boot=BOOT))
    assert not {"-S", "-incoming"} & set(line)
    assert line[-6:] == [
        *("-kernel", "/guest/vmlinuz", "-initrd", "/guest/initramfs"),
        *("-append", "console=ttyS0 quiet, really"),
    ]


def test_restored_and_booted_are_the_same_machine() -> None:
    """A device state fits only the machine it came from."""
    restored, booted = words(), words(replace(LAUNCH, boot=BOOT))
    assert restored[:-3] == booted[:-6]


def test_memory_is_mapped_privately() -> None:
    (memory,) = values("-object")
    assert memory == (
        "memory-backend-file,id=ram,size=536870912,mem-path=/images/root.ram,share=off,"
        "readonly=on,rom=off,merge=off"
    )
    assert values("-m") == ["536870912B"]
    assert values("-machine") == ["microvm,memory-backend=ram,suppress-vmdesc=on"]


def test_layers_are_read_only_and_each_backs_the_next() -> None:
    *layers, top = nodes()
    assert [layer["node-name"] for layer in layers] == ["layer0", "layer1", "layer2"]
    assert [layer["backing"] for layer in layers] == [None, "layer0", "layer1"]
    assert [layer["file"]["filename"] for layer in layers] == list(map(str, LAUNCH.disks))
    assert all(layer["read-only"] for layer in layers)
    assert top["backing"] == "layer2"
    assert top["node-name"] == command.FIRST_OVERLAY
    assert top["file"]["filename"] == str(LAUNCH.overlay)
    assert "read-only" not in top


def test_an_overlay_without_layers_has_no_backing() -> None:
    """Explicitly null: else QEMU would believe the header."""
    (top,) = nodes(replace(LAUNCH, disks=()))
    assert "backing" in top
    assert top["backing"] is None


def test_an_overlay_is_not_flushed() -> None:
    node = command.overlay_node("/dev/fdset/3", "overlay3")
    assert node["node-name"] == "overlay3"
    assert node["cache"] == node["file"]["cache"] == {"direct": False, "no-flush": True}


def test_the_guest_writes_to_the_overlay_and_stops_when_the_host_is_full() -> None:
    disk = next(value for value in values("-device") if value.startswith("virtio-blk"))
    assert f"drive={command.FIRST_OVERLAY}" in disk.split(",")
    assert {"werror=stop", "rerror=stop"} <= set(disk.split(","))


def test_devices_are_in_the_order_that_a_device_state_names() -> None:
    names = [value.partition(",name=")[2] or value.split(",")[0] for value in values("-device")]
    assert [name.removesuffix("-device") for name in names] == list(command.DEVICES)


def test_it_is_locked_in() -> None:
    (sandbox,) = values("-sandbox")
    assert sandbox.split(",")[0] == "on"
    assert {"spawn=deny", "elevateprivileges=deny", "obsolete=deny", "resourcecontrol=deny"} == set(
        sandbox.split(",")[1:]
    )
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(words())


def test_its_own_filter_is_closed_unless_a_policy_is_enforced_elsewhere() -> None:
    assert values("-netdev") == ["user,id=net,restrict=on,ipv6=off"]
    opened = replace(LAUNCH, restrict=False)
    assert values("-netdev", opened) == ["user,id=net,restrict=off,ipv6=off"]


def test_sockets_are_given_as_descriptors() -> None:
    qmp, _, agent, volumes = values("-chardev")
    assert qmp == "socket,id=qmp,fd=7,server=on,wait=off"
    assert agent == "socket,id=agent,fd=9,server=on,wait=off"
    assert volumes == "socket,id=volumes,fd=10,server=on,wait=off"


def test_commas_in_paths_and_names_do_not_end_an_option() -> None:
    launch = replace(
        LAUNCH,
        memory=Path("/a,b/,share=on"),
        disks=(Path('/a,b/"layer".qcow2'),),
        overlay=Path("/a,b/over,lay.qcow2"),
        log=Path("/a,b/l,og"),
    )
    (memory,) = values("-object", launch)
    assert "mem-path=/a,,b/,,share=on,share=off" in memory
    assert values("-chardev", launch)[1] == ("file,id=console,path=/a,,b/l,,og.console,append=on")
    layer, top = nodes(launch)
    assert layer["file"]["filename"] == '/a,b/"layer".qcow2'
    assert top["file"]["filename"] == "/a,b/over,lay.qcow2"


def test_no_path_is_opened_by_its_name(tmp_path: Path) -> None:
    """All is found by descriptor; a set's path is told, and opens nothing."""
    names = ("memory", "layer,0", "top", "vmlinuz", "initramfs")
    memory, layer, top, kernel, initramfs = (tmp_path / name for name in names)
    for name in names:
        (tmp_path / name).touch()
    boot = Boot(kernel, initramfs, "quiet")
    launch = replace(
        LAUNCH, memory=memory, disks=(layer,), overlay=top, log=tmp_path / "log", boot=boot
    )
    with GivenFiles() as given:
        line = command.arguments(launch, given, qmp_fd=7, agent_fd=9)
        assert not [word for word in line if str(tmp_path) in word]
        mounts = {place: opened(fd) for place, fd in given.mounts.items()}
        descriptors = [opened(fd) for fd in given.descriptors]
        with pytest.raises(OSError, match="Read-only file system"):
            os.fchmod(given.descriptors[1], 0o600)
    assert mounts == {
        "memory": (memory.stat(), os.O_RDONLY),
        "kernel": (kernel.stat(), os.O_RDONLY),
        "initramfs": (initramfs.stat(), os.O_RDONLY),
    }
    assert descriptors == [
        ((tmp_path / "log.console").stat(), os.O_WRONLY | os.O_APPEND),
        (layer.stat(), os.O_RDONLY),
        (top.stat(), os.O_RDWR),
        (top.stat(), os.O_RDONLY),
    ]
    told = [value for _, value in given.options]
    assert [value.partition(",opaque=")[2] for value in told] == [
        str(tmp_path / "log.console"),
        str(layer).replace(",", ",,"),
        *[str(top)] * 2,
    ]
    assert [value.partition("set=")[2].partition(",")[0] for value in told] == ["0", "1", "2", "2"]


def test_layers_are_opened_on_a_mount_that_is_read_only(tmp_path: Path) -> None:
    """Wherever they lie, and also if they are named by a descriptor and have no name any more."""
    layers = [tmp_path / name for name in ("base", "upper/disk", "flat")]
    (tmp_path / "upper").mkdir()
    for number, layer in enumerate(layers):
        layer.write_text(str(number))
    fd = os.open(layers[2], os.O_RDONLY)
    layers[2].unlink()
    try:
        for paths in (layers[:1], layers[:2], [Path(f"/proc/self/fd/{fd}")]):
            with GivenFiles() as given:
                names = given.layers(paths)
                assert names == [f"/dev/fdset/{number}" for number in range(len(paths))]
                for each in given.descriptors:
                    with pytest.raises(OSError, match="Read-only file system"):
                        os.fchmod(each, 0o600)
        with GivenFiles() as given:
            given.layers([Path(f"/proc/self/fd/{fd}"), *layers[:2]])
            assert [os.read(each, 9) for each in given.descriptors] == [b"2", b"0", b"1"]
    finally:
        os.close(fd)


def opened(fd: int) -> tuple[os.stat_result, int]:
    """What it is open on, and how."""
    return os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND)


def test_the_processor() -> None:
    assert values("-accel") == ["tcg"]
    assert values("-smp") == ["2"]
    kvm = replace(LAUNCH, hardware=replace(LAUNCH.hardware, accelerator="kvm"))
    assert values("-accel", kvm) == ["kvm,device=/dev/kvm"]


def test_a_processor_that_the_host_does_not_have_is_refused() -> None:
    """By itself, QEMU leaves out what is missing, and says so in its log alone."""
    assert values("-cpu") == ["max,enforce"]


def test_it_is_a_pure_function() -> None:
    """None of these files exists, and the same question has the same answer."""
    assert words() == words()
    assert all(isinstance(word, str) for word in words())
