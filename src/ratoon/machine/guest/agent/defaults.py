"""What programs are started with where a request does not say.

That is as the image has it, and beyond that as it was said when the sandbox was made.
"""

from __future__ import annotations


class Defaults:
    """`user` is None for the agent's own, which is root; `cwd` is absolute."""

    def __init__(
        self, env: dict[str, str] | None = None, user: str | None = None, cwd: str = "/"
    ) -> None:
        self.env = env or {}
        self.user = user
        self.cwd = cwd

    def changed(self, env: dict[str, str], user: str | None, cwd: str | None) -> Defaults:
        """These, with what `env` adds to them, and another user and directory where given."""
        return Defaults({**self.env, **env}, user or self.user, cwd or self.cwd)
