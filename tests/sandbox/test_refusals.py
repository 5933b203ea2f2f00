"""An agent that says no is alive: nobody waits for its machine to have died."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest

from ratoon.engine.sandbox.deaths import machine_death_as_error
from ratoon.errors import GuestError, GuestFileNotFound, MachineDied
from ratoon.machine.vmm.driver import Machine


class Dead:
    """A machine that died, and remembers that somebody asked."""

    cause_of_death = None

    def __init__(self) -> None:
        self.asked = False

    @asynccontextmanager
    async def while_moving(self) -> AsyncIterator[None]:
        yield

    async def packets(self) -> int:
        raise AssertionError

    async def wait_died(self) -> str:
        self.asked = True
        return "the end of its log"


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (GuestError("the channel is closed"), True),
        (GuestError("no such operation", kind="unknown"), False),
        (GuestFileNotFound("/x: No such file", kind="ENOENT"), False),
    ],
)
async def test_only_silence_is_blamed_on_a_death(error: GuestError, asked: bool) -> None:
    machine = Dead()
    with pytest.raises(MachineDied if asked else type(error)):
        async with machine_death_as_error(cast("Machine", machine), "it died"):
            raise error
    assert machine.asked == asked
