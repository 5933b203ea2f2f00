"""What a base's agent has practised is not done again in each fork."""

from __future__ import annotations

from vm_helpers import FOR_EVER, sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.guest.shared import wire

HOOK = """
mkdir -p /etc/ratoon/rebirth.d /etc/ssh
printf '#!/bin/sh\\necho "$RATOON_INSTANCE_ID" >>/root/told' >/etc/ratoon/rebirth.d/10-tell
chmod +x /etc/ratoon/rebirth.d/10-tell
echo old >/etc/ssh/ssh_host_ed25519_key
"""


#: Between what it takes with practice (some 370) and what without (some 600).
PAGES = 480


async def test_a_fork_that_does_little_dirties_little(engine: Engine) -> None:
    async with await engine.fork_one("base") as fork:
        assert (await fork.exec(["true"], timeout=FOR_EVER)).exit_code == 0
        assert (await fork.eval("7", timeout=FOR_EVER)).result == "7"
        branched = await engine.branch(fork, "little")
    assert 0 < branched.snapshot.manifest.layers[-1].memory.entries < PAGES


async def test_practice_leaves_hooks_and_keys_alone(sandbox: Sandbox) -> None:
    await sh(sandbox, HOOK)
    for kind, told in ((wire.PRACTICE, ""), (wire.FORK, "forked\n")):
        await sandbox.channel.rebirth("forked", "5" * 32, kind, timeout=FOR_EVER)
        assert await sh(sandbox, "hostname; cat /etc/machine-id") == f"forked\n{'5' * 32}\n"
        assert await sh(sandbox, "touch /root/told; cat /root/told") == told
        assert (await sh(sandbox, "ls /etc/ssh") == "ssh_host_ed25519_key\n") is not bool(told)
