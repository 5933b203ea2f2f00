"""Practice: before a base is taken, its agent does again and again what it will do in each fork.

CPython specializes a function's bytecode in place once it has run a few times (PEP 659). Until then
its calls take the general ways, which under emulation have to be translated first, and count in
pages that all forks share. What has happened before the snapshot happens in no fork.
"""

from __future__ import annotations

from contextlib import suppress

from ratoon.errors import NoPython
from ratoon.guest.agent import wire
from ratoon.sandbox.capture import freeze
from ratoon.sandbox.sandbox import Sandbox
from ratoon.sandbox.start import rebirth

#: A function is specialized in its ninth run; what is in it, in a run or two more.
ROUNDS = 12
#: Seconds for an interpreter to start, under emulation on a busy host.
TIMEOUT = 120.0


async def practise(sandbox: Sandbox) -> None:
    """Freeze and be reborn, run a program, and evaluate code: so it leaves the interpreter warm.

    An image that has no such program, or no Python, practises being told so. Its hooks and host
    keys are left alone. GuestError, GuestTimeout, MachineDied: as of what is practised.
    """
    run = sandbox.incarnation
    for _ in range(ROUNDS):
        await freeze(run)
        await rebirth(sandbox.id, sandbox.machine_id, run.machine, run.channel, wire.PRACTICE)
        await sandbox.exec(["true"], timeout=TIMEOUT)
        with suppress(NoPython):
            await sandbox.eval("0", timeout=TIMEOUT)
