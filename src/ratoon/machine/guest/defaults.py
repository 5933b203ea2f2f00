"""Telling a guest how programs are run, unless a request says otherwise."""

from __future__ import annotations

from collections.abc import Mapping

from ratoon.errors import GuestError, InvalidInput
from ratoon.machine.guest.channel import Agent
from ratoon.machine.guest.commands import TIMEOUT


async def change_defaults(
    agent: Agent, env: Mapping[str, str], user: str | None, workdir: str | None
) -> None:
    """Have programs started with `env` besides what they have, and as `user`, in `workdir`.

    None leaves what was said before: at first the root user, and `/`. The directory is made where
    it is missing. InvalidInput: it cannot be, or there is no such user.
    """
    cwd = workdir and f"/{workdir.lstrip('/')}"
    try:
        await agent.request("defaults", timeout=TIMEOUT, env={**env}, user=user or None, cwd=cwd)
    except GuestError as error:
        if error.kind not in ("no-user", "no-directory"):
            raise
        raise InvalidInput(f"programs cannot be run so: {error}") from None
