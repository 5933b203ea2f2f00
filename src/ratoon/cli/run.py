"""`ratoon run` and `ratoon exec`: commands in a sandbox, with the habits of Docker's."""

from __future__ import annotations

import os
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ratoon.cli.app import OWN_FAILURE, Json, print_json, say
from ratoon.cli.connect import talks
from ratoon.cli.naming import NAME, Sandbox, find, known_tags, require_free
from ratoon.cli.options import Env, Timeout, User, Workdir
from ratoon.errors import InvalidInput

if TYPE_CHECKING:
    from ratoon.cli.options import ImageWish
    from ratoon.client.aio.client import AsyncClient
    from ratoon.client.aio.commands import AsyncCommand
    from ratoon.client.aio.sandbox import AsyncSandbox
    from ratoon.client.options import Options

Interactive = Annotated[
    bool, typer.Option("--interactive", "-i", help="Give it what is typed or piped in here.")
]
Tty = Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal.")]
Command = Annotated[
    list[str] | None, typer.Argument(metavar="COMMAND", help="What to run, and its arguments.")
]


@dataclass(frozen=True)
class Wish:
    """What is to be run in a sandbox, and how."""

    argv: list[str] | None
    interactive: bool
    tty: bool
    env: dict[str, str]
    cwd: str | None
    user: str | None
    timeout: float | None


@talks("run", failure=OWN_FAILURE, takes_all=True)
async def run_in_fork(
    client: AsyncClient,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SNAPSHOT|IMAGE", help="What to fork, or to run.", autocompletion=known_tags
        ),
    ],
    options: Options,
    of_image: ImageWish,
    command: Command = None,
    interactive: Interactive = False,
    tty: Tty = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Leave the sandbox running, and print its id.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="What to call the sandbox.")] = None,
    env: Env = None,
    workdir: Workdir = None,
    user: User = None,
    timeout_secs: Timeout = None,
    as_json: Json = False,
) -> None:
    """Run a command in a fork of a snapshot or an image; end with its exit code.

    What is no snapshot's tag is an image. It is booted, and kept as it is before COMMAND starts;
    with a health check also as it is once COMMAND is up. The next equal run is a fork of that.
    COMMAND takes the place of the image's own.

    The fork is killed afterwards, and when this is interrupted. With -t, Ctrl-P Ctrl-Q leaves both
    running; without a COMMAND it is a shell then. With -d, COMMAND runs in the background: `ratoon
    logs` and `ratoon attach` find it.

    124: the command timed out; 125: Ratoon itself failed; 126, 127: it could not be executed, or
    was not found.
    """
    wish = _wish(command, interactive, tty, env, workdir, user, timeout_secs)
    from ratoon.cli import images_run

    _check(wish, detach=detach, as_json=as_json, may_be_bare=True)
    is_image = not await images_run.is_snapshot(client, source)
    if of_image.options and not is_image:
        raise InvalidInput(f"{source} is a snapshot: {', '.join(of_image.written)} is for images")
    if not is_image:
        _check(wish, detach=detach, as_json=as_json)
    if name is not None:
        await require_free(client, name)
        options["metadata"] = {**options.get("metadata", {}), NAME: name}
    from ratoon.client.aio.sandbox import AsyncSandbox

    async with AsyncExitStack() as held:
        if is_image:
            sandbox = await images_run.started(
                client, source, wish, of_image, options, detach=detach
            )
            wish = replace(wish, argv=images_run.argv_of(sandbox))
        else:
            sandbox = await AsyncSandbox.create(source, client=client, **options)
        await held.enter_async_context(sandbox)
        if detach:
            if wish.argv is not None and not is_image:
                await _left_running(sandbox, wish)
            held.pop_all()
            if as_json:
                print_json({**asdict(sandbox.info), **images_run.told(sandbox)})
            else:
                print(sandbox.id)
            return
        if of_image.waits:
            raise typer.Exit(await images_run.followed(sandbox, as_json=as_json))
        if is_image:
            _check(wish, detach=False, as_json=as_json)
        if as_json:
            await _collected(sandbox, wish)
        code = await _followed(sandbox, wish)
        if code is None:
            held.pop_all()
            say(f"sandbox {sandbox.id} goes on too; `ratoon kill {sandbox.id}` ends it")
    raise typer.Exit(code or 0)


@talks("exec", failure=OWN_FAILURE, takes_all=True)
async def run_in_sandbox(
    client: AsyncClient,
    sandbox: Sandbox,
    command: Command = None,
    interactive: Interactive = False,
    tty: Tty = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Run it in the background, and print its pid.")
    ] = False,
    env: Env = None,
    workdir: Workdir = None,
    user: User = None,
    timeout_secs: Timeout = None,
    as_json: Json = False,
) -> None:
    """Run a command in a sandbox, and end with its exit code.

    When this is interrupted the command is killed. With -t, Ctrl-P Ctrl-Q leaves it running;
    without a COMMAND it is a shell then. Exit codes are as with `ratoon run`.
    """
    wish = _wish(command, interactive, tty, env, workdir, user, timeout_secs)
    _check(wish, detach=detach, as_json=as_json)
    chosen = await find(client, sandbox)
    if detach:
        if wish.argv is None:
            raise InvalidInput("-d: say which command is to run")
        pid = await _left_running(chosen, wish)
        if as_json:
            print_json({"pid": pid})
        else:
            print(pid)
        return
    if as_json:
        await _collected(chosen, wish)
    raise typer.Exit(await _followed(chosen, wish) or 0)


def _wish(
    command: list[str] | None,
    interactive: bool,
    tty: bool,
    env: list[tuple[str, str]] | None,
    workdir: str | None,
    user: str | None,
    timeout: float | None,
) -> Wish:
    argv = command[1:] if command and command[0] == "--" else command
    return Wish(argv or None, interactive, tty, dict(env or []), workdir, user, timeout)


def _check(wish: Wish, *, detach: bool, as_json: bool, may_be_bare: bool = False) -> None:
    """InvalidInput: it makes no sense so. `may_be_bare`: there may be a command all the same."""
    from ratoon.cli.session import require_terminal

    if wish.argv is None and not wish.tty and not detach and not may_be_bare:
        raise InvalidInput("say which command is to run, or give -it for a shell")
    if wish.tty and (as_json or detach):
        raise InvalidInput("-t is for somebody who sits here: leave -d and --json out")
    if wish.tty:
        require_terminal()


async def _started(
    sandbox: AsyncSandbox, wish: Wish, *, background: bool, terminal: tuple[int, int] | None = None
) -> AsyncCommand:
    from ratoon.client.aio.pty import LOGIN_SHELL, TERM

    env = {"TERM": os.environ.get("TERM", TERM), **wish.env} if terminal else wish.env
    return await sandbox.commands.start(
        wish.argv or LOGIN_SHELL,
        stdin=wish.interactive,
        env=env,
        cwd=wish.cwd,
        user=wish.user,
        timeout=wish.timeout,
        terminal=terminal,
        background=background,
    )


async def _left_running(sandbox: AsyncSandbox, wish: Wish) -> int:
    """The pid of the command, which goes on by itself."""
    async with await _started(sandbox, wish, background=True) as running:
        if running.pid is None:
            ended = await running.wait(check=False)
            raise InvalidInput(ended.reason or "the command could not be started")
        return running.pid
    raise AssertionError


async def _collected(sandbox: AsyncSandbox, wish: Wish) -> NoReturn:
    """Print all about the command as JSON, once it has ended; Exit with its exit code."""
    from ratoon.cli import images_run

    assert wish.argv is not None
    result = await sandbox.commands.run(
        wish.argv,
        stdin=sys.stdin.buffer.read() if wish.interactive else None,
        env=wish.env,
        cwd=wish.cwd,
        user=wish.user,
        timeout=wish.timeout,
        check=False,
    )
    info = sandbox.info
    print_json(
        {
            "sandbox": sandbox.id,
            "exit_code": result.exit_code,
            "stdout": result.stdout,
            "stderr": result.stderr,
            "timed_out": result.timed_out,
            "error": result.reason,
            "truncated": result.truncated,
            "stages_ms": {**info.stages_ms, "fork": info.fork_ms},
            **images_run.told(sandbox),
        }
    )
    raise typer.Exit(result.exit_code)


async def _followed(sandbox: AsyncSandbox, wish: Wish) -> int | None:
    """The exit code of the command; None: it is left running."""
    from ratoon.cli.session import Detached, abandon, follow, size_here

    size = size_here() if wish.tty else None
    # On a terminal it can be left, so it must be able to go on.
    async with await _started(sandbox, wish, background=wish.tty, terminal=size) as running:
        try:
            return await follow(running, stdin=wish.interactive, on_terminal=wish.tty)
        except Detached:
            say(f"\r\ndetached; `ratoon attach {sandbox.id} {running.pid}` goes on")
            return None
        except BaseException:
            await abandon(running)
            raise
    raise AssertionError
