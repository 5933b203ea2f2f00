"""One run of a sandbox: its machine, from a load of its device state to standby, reset or the end.

A sandbox outlives it: in standby it has none, and a reset gives it another one.
"""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

from ratoon.guest.channel import Channel
from ratoon.network.namespaces import Namespace
from ratoon.sandbox.heads import MappedMemory
from ratoon.vmm.driver import Machine
from ratoon.volumes.relay import VolumeServer


@dataclass
class Incarnation:
    """A running machine and what belongs to it."""

    machine: Machine
    channel: Channel
    #: The file that is mapped privately as the guest's RAM.
    memory: MappedMemory
    #: What the guest's disk writes go to.
    overlay: Path
    #: Where its sockets are.
    runtime: Path
    #: Where its process is in the network.
    namespace: Namespace
    #: Whoever answers for its volumes, if it has any.
    volumes: VolumeServer | None = None
    #: The overlay below it that is in no layer yet, between a branch's switch and its end.
    frozen: Path | None = None

    async def undo_branch(self) -> None:
        """Go back to the overlay that a branch has frozen, with what was written since."""
        await self.machine.undo_overlay()
        assert self.frozen
        self.overlay.unlink()
        self.overlay, self.frozen = self.frozen, None

    async def let_go(self) -> None:
        """Speak to the machine no more; it goes on."""
        self.channel.close()
        await self._end_volumes()
        await self.machine.let_go()

    async def end(self) -> None:
        """Kill the machine and wait until it is gone; safe to repeat."""
        self.channel.close()
        await self.machine.kill()
        await self._end_volumes()
        await self.namespace.release()
        shutil.rmtree(self.runtime, ignore_errors=True)

    async def _end_volumes(self) -> None:
        if self.volumes:
            await asyncio.to_thread(self.volumes.close)
