"""`ratoon`: the program, its exit codes, and what all verbs share."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Coroutine
from importlib import import_module
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command_from_info

from ratoon.cli.verbs import SUBJECTS, VERBS
from ratoon.errors import InvalidInput, RatoonError

T = TypeVar("T")

INTERRUPTED = 130
#: Ratoon's own failure in a verb that gives the guest's exit code.
OWN_FAILURE = 125

_DIM, _RED = 2, 31

# Who enters a user namespace has one thread, and NumPy's library would start one for each processor
# at its import; nothing here uses those.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class _Verbs(TyperGroup):
    """Loads the module of a verb when it is used."""

    #: Whether it is names that are asked for, and no more.
    _naming = False

    def list_commands(self, ctx: Any) -> list[str]:
        return [*VERBS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        if self._naming:
            return TyperCommand(cmd_name, help=VERBS[cmd_name].help)
        import_module(f"ratoon.cli.{VERBS[cmd_name].module}")
        (verb,) = (each for each in app.registered_commands if each.name == cmd_name)
        return get_command_from_info(verb, pretty_exceptions_short=False, rich_markup_mode=None)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        self._naming = True
        try:
            return super().shell_complete(ctx, incomplete)
        finally:
            self._naming = False

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for subject, verbs in SUBJECTS.items():
            with formatter.section(subject):
                formatter.write_dl([(name, verb.help) for name, verb in verbs.items()])


app = typer.Typer(
    name="ratoon",
    cls=_Verbs,
    help="Fork microVMs: snapshot once, fork in milliseconds, stack diff snapshots into chains.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def enter_user_namespace() -> None:
    """Before an engine runs in this process: without root, it needs one. HostError."""
    if os.geteuid():
        from ratoon import paths
        from ratoon.engine.sandbox import residents
        from ratoon.jail import user_namespace

        user_namespace.enter(residents.processes(paths.home()))


def say(message: str) -> None:
    """Show progress."""
    _to_stderr(message, _DIM)


def complain(what: str) -> None:
    """Show an error."""
    _to_stderr(f"ratoon: {what}", _RED)


def print_json(value: Any) -> None:
    """The answer of a command with --json."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run what a verb waits for; SIGTERM and SIGHUP clean up as Ctrl-C does."""
    import asyncio
    import signal

    async def cancellable() -> T:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await main

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def explain(error: RatoonError) -> str:
    """An error's text, about options and not fields, with the status if it came over HTTP.

    What a program wrote may follow in further lines: the status is no part of that.
    """
    text = str(error)
    if isinstance(error, InvalidInput):
        from ratoon.cli.options import as_options

        text = as_options(text)
    first, newline, rest = text.partition("\n")
    status = f" (HTTP {error.answered})" if error.answered else ""
    return f"{first}{status}{newline}{rest}"


def _to_stderr(text: str, colour: int) -> None:
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        text = f"\x1b[{colour}m{text}\x1b[0m"
    print(text, file=sys.stderr, flush=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ratoon.version import __version__

        print(f"ratoon {__version__}")
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
        complain(explain(error))
        sys.exit(error.exit_code)
    except OSError as error:
        from ratoon import files

        complain(files.describe(error))
        sys.exit(RatoonError.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _find_programs_of_root() -> None:
    """Debian's users have them, and do not find them."""
    if os.geteuid():
        there = os.environ.get("PATH", os.defpath)
        os.environ["PATH"] = f"{there}:/usr/local/sbin:/usr/sbin:/sbin"


def program() -> None:
    """`main`, and the end of the process, which does not wait for the interpreter's own.

    All that a verb holds is let go of when it ends. To take apart what was imported besides would
    be a tenth of a short one's time.
    """
    _find_programs_of_root()
    code = 0
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        code = end.code
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # which the interpreter reports
        sys.exit(code)
    if threading.active_count() > 1:
        sys.exit(code)
    os._exit(code)
