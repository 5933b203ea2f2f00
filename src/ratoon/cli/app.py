"""`ratoon`: the program, its exit codes, and what all verbs share."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

import ratoon
from ratoon import files
from ratoon.errors import RatoonError

T = TypeVar("T")

INTERRUPTED = 130

#: Progress and errors go to stderr, so that stdout is the answer alone.
notes = Console(stderr=True)
answers = Console()

app = typer.Typer(
    name="ratoon",
    help="Fork microVMs: snapshot once, fork in milliseconds, stack diff snapshots into chains.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def say(message: str) -> None:
    """Show progress."""
    notes.print(message, style="dim", highlight=False)


def print_json(value: Any) -> None:
    """The answer of a command with --json."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run the engine's side of a command; SIGTERM cleans up as Ctrl-C does."""

    async def cancellable() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main

    return asyncio.run(cancellable())


def _print_version(wanted: bool) -> None:
    if wanted:
        answers.print(f"ratoon {ratoon.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, stream=sys.stderr)


def main() -> None:
    """Run the program; the exit code says what kind of error it was (see `ratoon.errors`)."""
    try:
        app()
    except RatoonError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        _complain(files.describe(error))
        sys.exit(RatoonError.exit_code)
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(INTERRUPTED)


def _complain(what: str) -> None:
    notes.print(f"ratoon: {what}", style="red", highlight=False, markup=False)
