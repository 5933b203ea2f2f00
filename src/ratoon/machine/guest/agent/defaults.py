"""What programs are started with where a request does not say: as the image has it."""

from __future__ import annotations


class Defaults:
    """`user` is None for the agent's own, which is root; `cwd` is absolute."""

    def __init__(
        self, env: dict[str, str] | None = None, user: str | None = None, cwd: str = "/"
    ) -> None:
        self.env = env or {}
        self.user = user
        self.cwd = cwd
