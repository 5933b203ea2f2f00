"""One run of a sandbox: its machine, from a load of its device state to standby, reset or the end.

A sandbox outlives it: in standby it has none, and a reset gives it another one. Whatever ends a
machine on purpose ends it here, so what its guest has written to volumes is with the host then, or
it is said why it may not be.
"""

from __future__ import annotations

import asyncio
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ratoon.engine.sandbox.activity import Activity
from ratoon.engine.sandbox.deaths import sandbox_death_as_error
from ratoon.engine.sandbox.memory_images import MappedMemory
from ratoon.errors import MachineError, RatoonError
from ratoon.machine.guest.channel import Channel, printable
from ratoon.machine.network.namespaces import Namespace
from ratoon.machine.vmm.driver import Machine
from ratoon.machine.volumes.relay import VolumeServer

#: Seconds that an end waits for what the guest has yet to write to its volumes.
SYNC_SECONDS = 5.0


@dataclass(frozen=True)
class Stillness:
    """What an attempt to have a guest stand still came to; it can be captured in any case.

    `running`: why its processes may run on; `unsynced`: why its volumes may lack what it wrote.
    """

    running: str | None = None
    unsynced: str | None = None

    @property
    def warning(self) -> str | None:
        """For who uses what is captured."""
        told = []
        if self.running:
            told.append(f"the guest's processes were running when it was branched: {self.running}")
        if self.unsynced:
            told.append(f"not all that it had written was in its volumes: {self.unsynced}")
        return "; ".join(told) or None


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
    #: How the guest came to stand still, while it does.
    still: Stillness | None = None
    #: What it does unasked.
    activity: Activity = field(init=False)

    def __post_init__(self) -> None:
        self.activity = Activity(self.machine, self.channel)

    @property
    def writes_volumes(self) -> bool:
        """Whether it may have something that is to reach the host."""
        return self.volumes is not None and self.volumes.writable

    async def sync(self, *, halt: bool = False) -> str | None:
        """Have the host know all that the guest has written to its volumes, within SYNC_SECONDS.

        What went wrong, if anything did. A guest that has none to write to is not asked. `halt`:
        its processes need not run any more, and are told to stop.
        """
        if self.still:
            return self.still.unsynced
        if not self.writes_volumes:
            return None
        try:
            async with sandbox_death_as_error(self.channel.name, self.machine):
                reply = await self.channel.request("sync", timeout=SYNC_SECONDS, halt=halt)
        except RatoonError as error:
            return str(error).partition("\n")[0]
        return unsynced(reply)

    async def undo_branch(self) -> None:
        """Go back to the overlay that a branch has frozen, with what was written since."""
        await self.machine.undo_overlay()
        assert self.frozen
        self.overlay.unlink()
        self.overlay, self.frozen = self.frozen, None

    async def settle_disk(self) -> None:
        """The overlay that a branch has frozen is a layer now: the machine can write it no more."""
        with suppress(MachineError):  # a machine that is lost writes nothing either
            await self.machine.settle_overlay()

    async def let_go(self) -> None:
        """Speak to the machine no more; it goes on."""
        self.channel.close()
        await self._end_volumes()
        await self.machine.let_go()

    async def end(self, *, now: bool = False) -> str | None:
        """Sync its volumes, kill the machine and wait until it is gone; safe to repeat.

        What went wrong with the sync, as of `sync`; `now`: there is none.
        """
        lost = None if now else await self.sync(halt=True)
        self.still = Stillness(unsynced=lost)
        self.channel.close()
        await self.machine.kill()
        await self._end_volumes()
        await self.namespace.release()
        shutil.rmtree(self.runtime, ignore_errors=True)
        return lost

    async def _end_volumes(self) -> None:
        if self.volumes:
            await asyncio.to_thread(self.volumes.close)


def unsynced(reply: dict[str, Any]) -> str | None:
    """What an agent says went wrong with a sync."""
    problem = reply.get("unsynced")
    return None if problem is None else printable(problem)
