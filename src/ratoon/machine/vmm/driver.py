"""What every virtual machine monitor must be able to do for Ratoon.

A driver starts one VM in a process of its own, either booting a kernel or waiting to be given a
saved device state, and can pause it, save it, and put a new overlay on its disk while it lives.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Accelerator = Literal["tcg", "kvm"]


@dataclass(frozen=True)
class Hardware:
    """The machine as the guest sees it; a device state fits only the hardware it came from.

    `cpu` is the model of its processors, see `vmm.cpu`.
    """

    ram_bytes: int
    vcpus: int
    accelerator: Accelerator
    cpu: str


@dataclass(frozen=True)
class Boot:
    """A cold start: the kernel, its initramfs and its command line."""

    kernel: Path
    initramfs: Path
    command_line: str


class Cgroup(Protocol):
    """A control group, which limits what is in it."""

    def add(self, pid: int) -> None:
        """Move a process in, with what it will start; blocks for some milliseconds. HostError."""

    def cause_of_death(self) -> str | None:
        """Which of the limits ended the process, if one did."""


@dataclass(frozen=True)
class Launch:
    """Everything that a machine is started from.

    `memory` is mapped privately: it is never written to. `disks` are read-only layers, base first;
    `overlay` is the writable one on top, whose header names no backing file. Without `boot` the
    machine waits, paused, for `load_state`. All files are opened by who starts it, and so may be
    named by a descriptor, as /proc/self/fd/N. `netns` is a descriptor of the network namespace that
    its process runs in, None an empty one of its own; its nameservers are in the file `resolver`.
    `restrict` has QEMU let no packet of the guest out in the first place. The process lives in
    `cgroup`, and no file that it writes grows beyond `file_limit` bytes: a guest whose disk would
    have to stands still then. It dies with its owner, unless it `survives` that: it can be attached
    to again then. Whatever becomes of it, it is known by the directory of its `log` (see
    `jail.inmates`).
    """

    name: str
    hardware: Hardware
    memory: Path
    disks: tuple[Path, ...]
    overlay: Path
    log: Path
    runtime: Path
    boot: Boot | None = None
    netns: int | None = None
    resolver: Path | None = None
    restrict: bool = True
    cgroup: Cgroup | None = None
    file_limit: int | None = None
    survives: bool = False


#: The queues of a network card count in 16 bits.
PACKETS_WRAP = 1 << 16


class Machine(Protocol):
    """One virtual machine. Every method raises MachineDied if its process is gone."""

    @property
    def pid(self) -> int:
        """The process whose memory holds the guest's RAM as a private mapping."""

    @property
    def agent_socket(self) -> Path:
        """The unix socket of the guest's agent port."""

    @property
    def volumes_socket(self) -> Path:
        """That of the port over which the guest's kernel reaches its volumes."""

    @property
    def has_died(self) -> bool:
        """Whether the process is gone."""

    @property
    def cause_of_death(self) -> str | None:
        """Why the process died, if it did not do so on request and something is known."""

    async def confine(self, cgroup: Cgroup | None, file_limit: int | None) -> None:
        """Give a running machine narrower limits than those it was launched with.

        It stays where it is without a `cgroup`, and its files keep their limit without another. A
        guest that stands still goes on with `resume`.
        """

    def while_moving(self) -> AbstractAsyncContextManager[None]:
        """Raise OutOfDisk in the block when the guest stands still, or if it does so already.

        It does when its disk is full. Whoever waits for the guest waits in such a block.
        """

    async def load_state(self, state: bytes) -> None:
        """Give a machine that waits its device state; it is paused afterwards."""

    async def resume(self) -> None:
        """Let the guest run."""

    async def pause(self) -> None:
        """Stop the guest; RAM, devices and disk stand still afterwards."""

    async def save_state(self) -> bytes:
        """The device state of a paused machine, RAM and disks left out."""

    async def add_overlay(self, overlay: Path) -> None:
        """Make an empty overlay known, to be switched to later; the guest may run."""

    async def switch_overlay(self) -> None:
        """Freeze the disk's writable layer and write to the added overlay from now on."""

    async def settle_overlay(self) -> None:
        """Keep no way to write to the layer that `switch_overlay` has frozen: others read it now.

        There is no `undo_overlay` then.
        """

    async def drop_overlay(self) -> None:
        """Forget an added overlay that was not switched to."""

    async def undo_overlay(self) -> None:
        """Write the overlay's content back into the layer below, and go on with that one.

        Only right after `switch_overlay`, while nobody else has come to rely on the frozen layer.
        """

    async def packets(self) -> int:
        """How many the guest has sent and received, modulo PACKETS_WRAP; it is not woken."""

    async def wait_died(self) -> str:
        """Return once the process is gone, with the end of its log."""

    async def let_go(self) -> None:
        """Speak to it no more; it goes on if its launch `survives`."""

    async def kill(self) -> None:
        """End the process and wait until it is gone; safe to repeat."""
