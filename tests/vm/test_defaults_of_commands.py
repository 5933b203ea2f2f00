"""What commands have that do not say otherwise: as it was said when the sandbox was made."""

from __future__ import annotations

import pytest
from vm_helpers import leaves_nothing

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import InvalidInput

MADE_WITH = SandboxOptions(env={"SAID": "at the fork"}, user="nobody:games", workdir="/made/for it")
AS_MADE = "at the fork|nobody|games|/made/for it"


async def told(sandbox: Sandbox, **said: str) -> str:
    script = 'echo "$SAID|$(id -un)|$(id -gn)|$(pwd)"'
    result = await sandbox.exec(["sh", "-c", script], **said)  # type: ignore[arg-type]
    return result.stdout.decode().strip()


async def test_as_its_options_say(engine: Engine) -> None:
    """In it, in its forks, and after all that gives it another machine."""
    async with await engine.fork_one("base", MADE_WITH) as sandbox:
        assert await told(sandbox) == AS_MADE
        assert await told(sandbox, user="root", cwd="/srv") == "at the fork|root|root|/srv"
        await engine.reset(sandbox)
        assert await told(sandbox) == AS_MADE
        await engine.standby(sandbox)
        await engine.resume(sandbox)
        assert await told(sandbox) == AS_MADE
        (fork,) = await engine.fork_sandbox(sandbox)
        assert isinstance(fork, Sandbox)
        async with fork:
            await engine.reset(fork)
            assert await told(fork) == AS_MADE
        await engine.branch(sandbox, "made-with")
    other = SandboxOptions(env={"MORE": "1"}, user="daemon")
    async with await engine.fork_one("made-with", other) as sandbox:
        assert await told(sandbox) == "at the fork|daemon|daemon|/made/for it"


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (SandboxOptions(user="nobody-here"), "no user 'nobody-here'"),
        (SandboxOptions(workdir="/etc/passwd"), "/etc/passwd cannot be made"),
    ],
)
async def test_what_cannot_be(engine: Engine, wrong: SandboxOptions, what: str) -> None:
    with leaves_nothing(engine), pytest.raises(InvalidInput, match=f"cannot be run so: .*{what}"):
        await engine.fork_one("base", wrong)
