"""Why an agent cannot be reached: most often because its machine is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from ratoon.errors import GuestError, GuestTimeout, MachineDied
from ratoon.machine.vmm.driver import Machine

#: Seconds: the channel of a machine that dies is closed a moment before its process is gone.
MOMENT = 0.5


@asynccontextmanager
async def machine_death_as_error(machine: Machine, what: str) -> AsyncIterator[None]:
    """Turn a GuestError into MachineDied, which says `what`, where the death is its cause.

    OutOfDisk: the guest stands still, so that it would not answer.
    """
    try:
        async with machine.while_moving():
            yield
    except GuestTimeout:
        raise
    except GuestError as error:
        if error.kind:
            raise  # the agent has said no: it lives
        try:
            async with asyncio.timeout(MOMENT):
                log_end = await machine.wait_died()
        except TimeoutError:
            raise error from None
        raise MachineDied(what, log_end, machine.cause_of_death) from None


def sandbox_death_as_error(sandbox_id: str, machine: Machine) -> AbstractAsyncContextManager[None]:
    """As `machine_death_as_error`, for the machine of a sandbox."""
    return machine_death_as_error(machine, f"sandbox {sandbox_id} died (process {machine.pid})")
