"""Practice: before a base is taken, its agent does again and again what it will do in each fork.

CPython specializes a function's bytecode in place once it has run a few times (PEP 659). Until then
its calls take the general ways, which under emulation have to be translated first, and count in
pages that all forks share. What has happened before the snapshot happens in no fork.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from ratoon.errors import NoPython
from ratoon.machine.guest import commands
from ratoon.machine.guest.channel import Channel
from ratoon.machine.guest.evaluation import evaluate
from ratoon.machine.guest.shared import wire

#: A function is specialized in its ninth run; what is in it, in a run or two more.
ROUNDS = 12
#: Seconds for each thing: an interpreter that starts, under emulation on a busy host.
TIMEOUT = 120.0
#: Seconds for the guest's processes to stand still; it does not matter whether they do.
STILL_WITHIN = 2.0
#: What most first commands are: a program, and a shell that starts one. An image may have neither.
REHEARSED = (["true"], ["sh", "-c", "true; /bin/true; :"])


async def practise(channel: Channel, name: str, machine_id: str, kind: int = wire.PRACTICE) -> None:
    """Freeze and be reborn, run a program, and evaluate code: so it leaves the interpreter warm.

    The guest is `name` already, and stays it; `kind` is PRACTICE, or that and ONLINE. An image that
    has no such program, or no Python, practises being told so; its hooks and host keys are left
    alone. GuestError, GuestTimeout.
    """
    for _ in range(ROUNDS):
        await channel.request("freeze", timeout=TIMEOUT, seconds=STILL_WITHIN, sync_seconds=0)
        channel.begin()
        await channel.rebirth(name, machine_id, kind, timeout=TIMEOUT)
        await commands.exec(channel, ["true"], timeout=TIMEOUT)
        with suppress(NoPython):
            await evaluate(channel, "0", timeout=TIMEOUT)


async def rehearse(channel: Channel, name: str, machine_id: str, kind: int) -> bool:
    """Have a machine that waits be reborn and run programs, so that QEMU has translated all that.

    The sandbox's own processes stand still meanwhile, and so they do afterwards. `kind` is
    REHEARSAL, or that and ONLINE. Whether it went well: not where volumes are mounted from before,
    as nobody answers for them yet. GuestError, GuestTimeout.
    """
    channel.begin()
    if await channel.rebirth(name, machine_id, kind, timeout=TIMEOUT):
        return False
    for argv in REHEARSED:
        fields = {"argv": argv, "rehearsed": True}
        async with channel.open("exec", **fields) as stream, asyncio.timeout(TIMEOUT):
            await stream.result()
    return True
