"""What a sandbox does itself at its rebirth: hooks, host keys; and what a resume leaves alone."""

from __future__ import annotations

import random
import time

import pytest
from vm_helpers import FOR_EVER, leaves_nothing, sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import GuestError
from ratoon.machine.guest.evaluation import evaluate

#: A process that leaves a line as often as it can, hooks that look at it, and a host key. Of
#: `ssh-keygen` there is what matters here: it writes a key where it is told to.
PREPARE = r"""
mkdir -p /etc/ratoon/rebirth.d /etc/ssh
cat >/usr/local/bin/ssh-keygen <<'END'
#!/bin/sh
while [ "$1" != -f ]; do shift; done
cat /proc/sys/kernel/random/uuid >"$2"
END
cat >/etc/ratoon/rebirth.d/10-look <<'END'
#!/bin/sh
echo "$RATOON_INSTANCE_ID $RATOON_MACHINE_ID" >/root/told
echo "$(hostname) $(cat /etc/machine-id)" >/root/found
cat /etc/ssh/ssh_host_ed25519_key >/root/key
wc -l </dev/shm/ticks >/root/ticks
sleep 300 >/dev/null 2>&1 &
echo $! >/root/left
sleep 0.2
END
cat >/etc/ratoon/rebirth.d/20-look-again <<'END'
#!/bin/sh
wc -l </dev/shm/ticks >>/root/ticks
END
chmod +x /usr/local/bin/ssh-keygen /etc/ratoon/rebirth.d/*
echo old >/etc/ssh/ssh_host_ed25519_key
echo old >/etc/ssh/ssh_host_ed25519_key.pub
setsid sh -c 'while :; do echo; done >/dev/shm/ticks' &
until [ -s /dev/shm/ticks ]; do sleep 0.05; done
"""


async def test_hooks_and_host_keys_before_anything_runs(engine: Engine) -> None:
    keys = []
    async with await engine.fork_one("base") as source:
        await sh(source, PREPARE)
        await engine.branch(source, "hooked")
        assert await sh(source, "ls /root; cat /etc/ssh/ssh_host_ed25519_key") == "old\n"
    for _ in range(2):
        async with await engine.fork_one("hooked") as fork:
            names = (await sh(fork, "cat /root/told /root/found")).splitlines()
            assert names[0] == names[1] == f"{fork.id} {fork.machine_id}"
            ticks = (await sh(fork, "cat /root/ticks")).split()
            assert ticks[0] == ticks[1]
            await sh(
                fork, f"until [ $(wc -l </dev/shm/ticks) -gt {ticks[1]} ]; do sleep 0.05; done"
            )
            keys.append(await sh(fork, "cat /root/key"))
            assert await sh(fork, "cat /etc/ssh/ssh_host_*") == keys[-1]
            # What a hook leaves running is the sandbox's.
            assert await sh(fork, "cat /proc/$(cat /root/left)/cgroup") == "0::/sandbox\n"
    assert len({"old\n", *keys}) == 3


HOOK = "/etc/ratoon/rebirth.d/50-bad"
BAD_HOOK = f"""
mkdir -p $(dirname {HOOK})
printf '#!/bin/sh\\necho no luck >&2; exit 7' >{HOOK}
chmod +x {HOOK}
"""


async def test_a_hook_that_fails_fails_the_fork(engine: Engine, sandbox: Sandbox) -> None:
    await sh(sandbox, BAD_HOOK)
    await engine.branch(sandbox, "bad-hook")
    with (
        leaves_nothing(engine),
        pytest.raises(GuestError, match=f"rebirth: rebirth hook {HOOK} exited with 7: no luck"),
    ):
        await engine.fork_one("bad-hook")


async def test_a_resume_brings_the_time_and_changes_nothing_else(engine: Engine) -> None:
    async with await engine.fork_one("base") as sandbox:
        await sh(sandbox, f"{BAD_HOOK}\nhostname mine")
        await evaluate(sandbox, "import random; random.seed(1)", timeout=FOR_EVER)
        await engine.standby(sandbox)
        before = time.time()
        await engine.resume(sandbox)
        who = await sh(sandbox, "hostname; cat /etc/machine-id /run/ratoon/instance-id")
        assert who == f"mine\n{sandbox.machine_id}\n{sandbox.id}\n"
        draw = "import time; random.random(), time.time()"
        result = await evaluate(sandbox, draw, timeout=FOR_EVER)
        drawn, now = eval(result.result or "")
        assert drawn == random.Random(1).random()
        assert now > before
