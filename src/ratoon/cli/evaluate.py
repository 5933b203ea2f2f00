"""`ratoon eval`: Python in a sandbox."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ratoon.cli.app import OWN_FAILURE, Json, print_json
from ratoon.cli.connect import client_command
from ratoon.cli.naming import Sandbox, find
from ratoon.cli.options import Timeout

if TYPE_CHECKING:
    from ratoon.client.aio.client import AsyncClient


@client_command("eval", failure=OWN_FAILURE)
async def evaluate(
    client: AsyncClient,
    sandbox: Sandbox,
    code: Annotated[
        str | None, typer.Argument(metavar="CODE", help="Python; from stdin if none.")
    ] = None,
    timeout_secs: Timeout = None,
    as_json: Json = False,
) -> None:
    """Run Python in a sandbox's warm interpreter.

    It keeps its state from call to call, and forks of the sandbox have it too. Shown are what the
    code writes and the value of its last line. Exit code 1 for an exception, 124 if it timed out.
    """
    chosen = await find(client, sandbox)
    text = sys.stdin.read() if code is None else code

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    result = await chosen.eval(
        text,
        timeout=timeout_secs,
        on_stdout=None if as_json else show,
        on_stderr=None if as_json else sys.stderr.write,
    )
    if as_json:
        print_json(asdict(result))
    elif result.result is not None:
        print(result.result)
    if result.error and not as_json:
        print(result.error, file=sys.stderr)
    raise typer.Exit(result.exit_code)
