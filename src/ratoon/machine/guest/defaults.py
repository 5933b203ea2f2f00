"""Telling a guest how its image wants programs run."""

from __future__ import annotations

from ratoon.errors import GuestError, InvalidInput
from ratoon.machine.guest.channel import Agent
from ratoon.machine.guest.commands import TIMEOUT
from ratoon.store.snapshot.image_config import ImageConfig

#: What the agent starts programs as, if nobody says who.
_ROOT = (None, "", "root", "0", "root:root", "0:0")


async def set_defaults(agent: Agent, config: ImageConfig) -> None:
    """Have all programs start as `config` says, unless a request says otherwise.

    The working directory is made where it is missing. InvalidInput: it cannot be, or there is no
    such user.
    """
    user = None if config.user in _ROOT else config.user
    cwd = f"/{(config.workdir or '').lstrip('/')}"
    try:
        await agent.request("defaults", timeout=TIMEOUT, env=config.env, user=user, cwd=cwd)
    except GuestError as error:
        if error.kind not in ("no-user", "no-directory"):
            raise
        raise InvalidInput(f"the image cannot be run as it says: {error}") from None
