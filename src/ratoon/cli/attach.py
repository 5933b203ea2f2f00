"""`ratoon attach` and `ratoon logs`: commands that were left running."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from ratoon.cli.app import OWN_FAILURE, say
from ratoon.cli.connect import client_command
from ratoon.cli.naming import Sandbox, find
from ratoon.errors import Conflict, NotFound

if TYPE_CHECKING:
    from ratoon.api.answers import ProcessInfo
    from ratoon.client.aio.client import AsyncClient, AsyncSandbox
    from ratoon.client.aio.commands import AsyncCommand

#: Seconds without output after which all that was written is taken to be there.
QUIET = 0.3

Pid = Annotated[
    int | None,
    typer.Argument(help="Which of its commands; the last one in the background if not said."),
]


@client_command("attach", failure=OWN_FAILURE)
async def attach(client: AsyncClient, sandbox: Sandbox, pid: Pid = None) -> None:
    """Go on with a command that runs in a sandbox.

    What it wrote last is shown again, and it is given what is typed here; Ctrl-P Ctrl-Q leaves it
    running, if it has a terminal. SIGINT and SIGTERM are passed on to it; the second one ends this
    alone. Whoever was attached is not any more. Ends with its exit code.
    """
    from ratoon.cli.session import Detached, follow, require_terminal, size_here

    chosen = await find(client, sandbox)
    process = await _process(chosen, pid)
    if process.terminal:
        require_terminal()
    async with await chosen.commands.connect(process.pid) as running:
        if process.terminal:
            await running.resize(*size_here())
        try:
            code = await follow(running, stdin=True, on_terminal=process.terminal)
        except Detached:
            say(f"\r\ndetached; `ratoon attach {chosen.id} {running.pid}` goes on")
            code = 0
    raise typer.Exit(code)


@client_command("logs")
async def logs(
    client: AsyncClient,
    sandbox: Sandbox,
    pid: Pid = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the command ends.")
    ] = False,
) -> None:
    """Show what a command in the background has written.

    That is the end of its output, 64 KiB or so. Refused while somebody is attached to it.
    """
    chosen = await find(client, sandbox)
    process = await _process(chosen, pid)
    if process.attached:
        raise Conflict(
            f"somebody is attached to process {process.pid} of {chosen.id}, and hears it"
        )
    async with await chosen.commands.connect(process.pid) as running:
        await _show(chosen, running, to_the_end=follow or process.exit_code is not None)


async def _show(sandbox: AsyncSandbox, running: AsyncCommand, *, to_the_end: bool) -> None:
    from ratoon.cli.terminal import write

    # What is on the way already comes before the answer to this.
    limit = None if to_the_end else QUIET
    if not to_the_end:
        await sandbox.commands.list()
    while True:
        try:
            async with asyncio.timeout(limit):
                output = await running.read()
        except TimeoutError:
            return
        if output is None:
            return
        await write(1 if output.stream == "stdout" else 2, output.data)


async def _process(sandbox: AsyncSandbox, pid: int | None) -> ProcessInfo:
    found = await sandbox.commands.list()
    if pid is None:
        found = [each for each in found if each.background]
    else:
        found = [each for each in found if each.pid == pid]
    if not found:
        which = "no command in the background" if pid is None else f"no command {pid}"
        raise NotFound(f"sandbox {sandbox.id} has {which}; `ratoon top {sandbox.id}` shows all")
    return max(found, key=lambda each: each.started_at)
