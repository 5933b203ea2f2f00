"""Programs on a terminal of the sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ratoon.client.aio.commands import AsyncCommand, AsyncCommands

#: A login shell: the better of the two that a guest may have.
LOGIN_SHELL = "if command -v bash >/dev/null; then exec bash -l; else exec sh -l; fi"
TERM = "xterm-256color"


class AsyncPty:
    """The terminals of one sandbox: `sandbox.pty`."""

    def __init__(self, commands: AsyncCommands) -> None:
        self._commands = commands

    async def create(
        self,
        command: str | Sequence[str] = LOGIN_SHELL,
        *,
        rows: int = 24,
        columns: int = 80,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        background: bool = False,
    ) -> AsyncCommand:
        """Start a program on a terminal of that size; `run` tells of the other arguments.

        All that it writes is its stdout, as bytes: iterate over the command, or `wait` with
        `on_stdout`. `send_stdin` is the keyboard, `resize` another size. It is hung up when the
        command's block is left, unless it is in the `background`.
        """
        return await self._commands.start(
            command,
            stdin=True,
            env={"TERM": TERM, **(env or {})},
            cwd=cwd,
            user=user,
            timeout=timeout,
            terminal=(rows, columns),
            background=background,
        )
