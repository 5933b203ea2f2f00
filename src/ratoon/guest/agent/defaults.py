"""What programs are started with where a request does not say: as the image has it."""

from __future__ import annotations

import os

from .stream import Refusal, Stream, operation
from .users import look_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .stream import Request


class Defaults:
    """`user` is None for the agent's own, which is root; `cwd` is absolute."""

    def __init__(
        self, env: dict[str, str] | None = None, user: str | None = None, cwd: str = "/"
    ) -> None:
        self.env = env or {}
        self.user = user
        self.cwd = cwd


@operation("defaults")
class SetDefaults(Stream):
    """Have new ones, for all that is started from here on; the directory is made if need be."""

    def start(self, request: Request) -> None:
        defaults = Defaults(request["env"], request["user"], request["cwd"])
        if defaults.user is not None:
            look_up(defaults.user)
        try:
            os.makedirs(defaults.cwd, exist_ok=True)
        except OSError as error:
            reason = f"the directory {defaults.cwd} cannot be made: {error.strerror}"
            raise Refusal(reason, "no-directory") from None
        self.agent.processes.defaults = defaults
        self.reply()
