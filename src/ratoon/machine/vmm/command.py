"""QEMU's command line: what the machine consists of, and the files that it is started from.

No path of the host is on it that QEMU opens: see `given_files`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ratoon.machine.vmm import kvm
from ratoon.machine.vmm.driver import Accelerator, Launch
from ratoon.machine.vmm.given_files import (
    APPEND,
    DEVICE,
    INITRAMFS,
    KERNEL,
    MEMORY,
    READ_AND_WRITE,
    Files,
)

BINARY = "qemu-system-x86_64"
MACHINE = "microvm"
#: The nodes of writable overlays are numbered; a machine starts with the first.
OVERLAY = "overlay"
FIRST_OVERLAY = f"{OVERLAY}0"
#: Of the serial device, by number.
PORTS = ("ratoon.agent", "ratoon.volumes")
#: In the order the guest sees them. A device state fits only this list.
DEVICES = ("virtio-blk", "virtio-serial", *PORTS, "virtio-rng", "virtio-net")


def arguments(
    launch: Launch, files: Files, *, qmp_fd: int, agent_fd: int, volumes_fd: int | None = None
) -> list[str]:
    """The arguments after the program's name, without what `files` may have to say of them.

    The descriptors are listening unix sockets.
    """
    hardware = launch.hardware
    console = files.in_set(console_log(launch.log), APPEND)
    lines: list[tuple[str, ...]] = [
        ("-name", launch.name),
        ("-nodefaults",),
        ("-no-user-config",),
        ("-no-reboot",),
        ("-display", "none"),
        ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        ("-accel", _accelerator(hardware.accelerator, files)),
        # Without a word, QEMU leaves out what the host does not have.
        ("-cpu", f"{hardware.cpu},enforce"),
        ("-smp", str(hardware.vcpus)),
        ("-m", f"{hardware.ram_bytes}B"),
        # A description of the state in itself would be of use to other QEMU versions only.
        ("-machine", f"{MACHINE},memory-backend=ram,suppress-vmdesc=on"),
        ("-object", _memory(launch, files)),
        ("-global", "virtio-mmio.force-legacy=false"),
        ("-global", "migration.send-configuration=off"),
        ("-chardev", f"socket,id=qmp,fd={qmp_fd},server=on,wait=off"),
        ("-mon", "chardev=qmp,mode=control"),
        ("-chardev", f"file,id=console,path={_escape(console)},append=on"),
        ("-serial", "chardev:console"),
        *_disk_nodes(launch, files),
        # A full host stops the guest with an error that can be resumed, not a broken file system.
        ("-device", f"virtio-blk-device,drive={FIRST_OVERLAY},id=disk,werror=stop,rerror=stop"),
        ("-chardev", f"socket,id=agent,fd={agent_fd},server=on,wait=off"),
        ("-device", "virtio-serial-device"),
        ("-device", f"virtserialport,chardev=agent,name={PORTS[0]}"),
        ("-chardev", _volumes(volumes_fd)),
        ("-device", f"virtserialport,chardev=volumes,name={PORTS[1]}"),
        ("-device", "virtio-rng-device"),
        # No IPv6: no policy has a rule for it.
        ("-netdev", f"user,id=net,restrict={'on' if launch.restrict else 'off'},ipv6=off"),
        ("-device", "virtio-net-device,netdev=net"),
    ]
    if launch.boot is None:
        lines.append(("-S", "-incoming", "defer"))
    else:
        boot = launch.boot
        lines.append(("-kernel", files.mounted(boot.kernel, KERNEL)))
        lines.append(("-initrd", files.mounted(boot.initramfs, INITRAMFS)))
        lines.append(("-append", boot.command_line))
    return [word for line in lines for word in line]


def console_log(log: Path) -> Path:
    """Where the guest's console goes, beside QEMU's own log."""
    return log.with_name(f"{log.name}.console")


def overlay_node(filename: str, name: str) -> dict[str, Any]:
    """The block node of a writable overlay; its backing node is given when it is used.

    no-flush: what the guest flushes reaches the page cache only, and `stop` does not wait for the
    disk. A sandbox's disk need not survive power loss; whoever publishes one flushes it.
    """
    return _node(filename, name, no_flush=True, discard="unmap")


def _node(filename: str, name: str, *, no_flush: bool = False, **more: Any) -> dict[str, Any]:
    """Without QEMU's own locks: they belong to the open file, which a set of descriptors shares.

    Who holds the sandbox's directory is who may start a machine on its overlay, and nobody writes
    to layers.
    """
    cache = {"direct": False, "no-flush": no_flush}
    file = {
        **{"driver": "file", "node-name": file_node(name), "filename": filename},
        **{"locking": "off", "cache": cache},
    }
    return {"driver": "qcow2", "node-name": name, "file": file, "cache": cache, **more}


def file_node(name: str) -> str:
    """The node of the file below that of an overlay or layer."""
    return f"file-{name}"


def _accelerator(name: Accelerator, files: Files) -> str:
    return name if name == "tcg" else f"{name},device={files.in_set(kvm.DEVICE, DEVICE)}"


def _memory(launch: Launch, files: Files) -> str:
    """The guest's RAM: a private mapping of a file that is opened for reading alone."""
    size, path = launch.hardware.ram_bytes, _escape(files.mounted(launch.memory, MEMORY))
    return (
        f"memory-backend-file,id=ram,size={size},mem-path={path},share=off,readonly=on,rom=off,"
        "merge=off"
    )


def _disk_nodes(launch: Launch, files: Files) -> list[tuple[str, ...]]:
    """Read-only layers base first, each the next one's backing node, and the overlay on top.

    The graph is given here because one layer's inode has many names: no header may carry a path.
    """
    nodes = [
        _node(name, f"layer{number}", **{"read-only": True})
        for number, name in enumerate(files.layers(launch.disks))
    ]
    nodes.append(overlay_node(files.in_set(launch.overlay, READ_AND_WRITE), FIRST_OVERLAY))
    below = [None, *(node["node-name"] for node in nodes)]
    return [
        ("-blockdev", json.dumps({**node, "backing": backing}))
        for node, backing in zip(nodes, below, strict=False)
    ]


def _volumes(fd: int | None) -> str:
    """Who is at the other end of the volumes' port; None: nobody ever is."""
    return "null,id=volumes" if fd is None else f"socket,id=volumes,fd={fd},server=on,wait=off"


def _escape(path: str) -> str:
    """A path inside QEMU's comma-separated options."""
    return path.replace(",", ",,")
