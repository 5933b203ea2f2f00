"""`ratoon run` and `ratoon exec`: commands in a sandbox, with the habits of Docker's."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ratoon.cli.app import OWN_FAILURE, Json, print_json, say
from ratoon.cli.connect import client_command
from ratoon.cli.naming import NAME, Sandbox, find, known_tags, located, require_free
from ratoon.cli.options import Env, Timeout, User, Workdir
from ratoon.cli.showing import printable, tell_unsynced
from ratoon.errors import InvalidInput, NotFound, RegistryError

if TYPE_CHECKING:
    from ratoon.cli.options import ImageOptions
    from ratoon.client.aio.client import AsyncClient, AsyncSandbox
    from ratoon.client.aio.commands import AsyncCommand
    from ratoon.client.options import Options
    from ratoon.client.output import CommandResult
    from ratoon.client.runs import RunOptions

Interactive = Annotated[
    bool, typer.Option("--interactive", "-i", help="Give it what is typed or piped in here.")
]
Tty = Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal.")]
Command = Annotated[
    list[str] | None, typer.Argument(metavar="COMMAND", help="What to run, and its arguments.")
]

#: Seconds after which somebody who waits wants to hear of it.
PATIENCE = 0.7

_TAG = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class CommandSpec:
    """What is to be run in a sandbox, and how."""

    argv: list[str] | None
    interactive: bool
    tty: bool
    timeout: float | None
    #: None of it: as the sandbox has it.
    env: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None
    user: str | None = None
    #: The sandbox is made for it.
    main: bool = False
    own_pids: bool = False


@client_command("run", failure=OWN_FAILURE, takes_all=True)
async def run_in_fork(
    client: AsyncClient,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SNAPSHOT|IMAGE", help="What to fork, or to run.", autocompletion=known_tags
        ),
    ],
    options: Options,
    of_image: ImageOptions,
    command: Command = None,
    interactive: Interactive = False,
    tty: Tty = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Leave the sandbox running, and print its id.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="What to call the sandbox.")] = None,
    timeout_secs: Timeout = None,
    as_json: Json = False,
) -> None:
    """Run a command in a fork of a snapshot or an image; end with its exit code.

    What is no snapshot's tag is an image. It is booted, and kept as it is before COMMAND starts;
    with a health check also as it is once COMMAND is up. The next equal run is a fork of that.
    COMMAND takes the place of the image's own.

    The fork is killed afterwards. SIGINT and SIGTERM are passed on to COMMAND; the second one ends
    this, and kills the fork. With -t, Ctrl-P Ctrl-Q leaves both
    running; without a COMMAND it is a shell then. With -d, COMMAND runs in the background: `ratoon
    logs` and `ratoon attach` find it. `ratoon exec` has its environment, directory and user.

    124: the command timed out; 125: Ratoon itself failed; 126, 127: it could not be executed, or
    was not found.
    """
    spec = _spec_of(command, interactive, tty, timeout_secs, main=True)
    _check(spec, detach=detach, as_json=as_json, may_be_bare=True)
    is_image = not await _is_snapshot(client, source)
    if of_image.options and not is_image:
        raise InvalidInput(f"{source} is a snapshot: {', '.join(of_image.written)} is for images")
    if not is_image:
        _check(spec, detach=detach, as_json=as_json)
    if name is not None:
        await require_free(client, name)
        options["metadata"] = {**options.get("metadata", {}), NAME: name}
    from ratoon.client.aio.client import AsyncSandbox

    async with AsyncExitStack() as held:
        if is_image:
            sandbox = await _image_started(client, source, spec, of_image, options, detach=detach)
            assert sandbox.run is not None
            spec = replace(
                spec,
                argv=sandbox.run.argv or None,  # with the image's entrypoint
                own_pids=not of_image.options.get("init"),
            )
        else:
            sandbox = await AsyncSandbox.create(source, client=client, **options)
        held.callback(tell_unsynced, sandbox)
        await held.enter_async_context(sandbox)
        if detach:
            if spec.argv is not None and not is_image:
                await _left_running(sandbox, spec)
            held.pop_all()
            if as_json:
                with suppress(NotFound):  # with --rm
                    await sandbox.refresh()
                print_json({**asdict(sandbox.info), **_image_facts(sandbox)})
            else:
                print(sandbox.id)
            return
        if of_image.waits:
            raise typer.Exit(await _image_followed(sandbox, as_json=as_json))
        if is_image:
            _check(spec, detach=False, as_json=as_json)
        if as_json:
            await _collected(sandbox, spec)
        code = await _followed(sandbox, spec)
        if code is None:
            held.pop_all()
            say(f"sandbox {sandbox.id} goes on too; `ratoon kill {sandbox.id}` ends it")
    raise typer.Exit(code or 0)


@client_command("exec", failure=OWN_FAILURE, takes_all=True)
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

    SIGINT and SIGTERM are passed on to it; at the second one this ends, and it is killed. With -t,
    Ctrl-P Ctrl-Q leaves it running; without a COMMAND it is a shell then. Exit codes are as with
    `ratoon run`.
    """
    given = _spec_of(command, interactive, tty, timeout_secs)
    spec = replace(given, env=dict(env or []), cwd=workdir, user=user)
    _check(spec, detach=detach, as_json=as_json)
    chosen = await find(client, sandbox)
    if detach:
        if spec.argv is None:
            raise InvalidInput("-d: say which command is to run")
        pid = await _left_running(chosen, spec)
        if as_json:
            print_json({"pid": pid})
        else:
            print(pid)
        return
    if as_json:
        await _collected(chosen, spec)
    raise typer.Exit(await _followed(chosen, spec) or 0)


def _spec_of(
    command: list[str] | None,
    interactive: bool,
    tty: bool,
    timeout: float | None,
    *,
    main: bool = False,
) -> CommandSpec:
    argv = command[1:] if command and command[0] == "--" else command
    return CommandSpec(argv or None, interactive, tty, timeout, main=main)


def _check(spec: CommandSpec, *, detach: bool, as_json: bool, may_be_bare: bool = False) -> None:
    """InvalidInput: it makes no sense so. `may_be_bare`: there may be a command all the same."""
    from ratoon.cli.session import require_terminal

    if spec.argv is None and not spec.tty and not detach and not may_be_bare:
        raise InvalidInput("say which command is to run, or give -it for a shell")
    if spec.tty and (as_json or detach):
        raise InvalidInput("-t is for somebody who sits here: leave -d and --json out")
    if spec.tty:
        require_terminal()


async def _is_snapshot(client: AsyncClient, name: str) -> bool:
    """Whether there is a snapshot of that name; else it is an image's."""
    if not _TAG.fullmatch(name):
        return False
    try:
        await client.snapshots.get(name)
    except NotFound:
        return False
    return True


async def _image_started(
    client: AsyncClient,
    name: str,
    spec: CommandSpec,
    image: ImageOptions,
    options: Options,
    *,
    detach: bool,
) -> AsyncSandbox:
    """The sandbox of an image that is run; a line says where it came from.

    What is waited for, or left running, is started there; the rest is for who follows it.
    """
    name, start = located(name), image.waits or detach
    if image.waits and (spec.interactive or spec.tty):
        raise InvalidInput("with -i or -t nothing can be kept of a command: leave the check out")
    if start and spec.timeout is not None:
        raise InvalidInput("--timeout-secs is for who waits for the end: use --ttl here")
    given: Any = {**options, **image.options, "start": start}
    run_options: RunOptions = given
    command = spec.argv or None
    try:
        sandbox = await _patiently(client, name, client.run_image(name, command, **run_options))
    except (NotFound, RegistryError):
        if _TAG.fullmatch(name):
            say(f"there is no snapshot {name}, and as an image:")
        if (place := Path(name)).exists():
            kind = "dir" if place.is_dir() else "tar"
            say(printable(f"if what is called {name} here is meant, write {kind}:{name}"))
        raise
    run = sandbox.run
    assert run is not None
    tag = sandbox.info.snapshot_tag
    kept = (
        "the image was booted",
        f"started from tier 1, {tag}, the booted image",
        f"started from tier 2, {tag}, where it was up",
    )[run.tier]
    missed = f"; {'; '.join(run.missed)}" if run.missed else ""
    say(printable(f"{name}: {kept}{missed}"))
    return sandbox


async def _patiently(
    client: AsyncClient, image: str, work: Coroutine[Any, Any, AsyncSandbox]
) -> AsyncSandbox:
    """What `work` gives; if it takes long, how far it is is said meanwhile."""
    import asyncio

    from ratoon.concurrency import run_alongside

    async def tell() -> None:
        await asyncio.sleep(PATIENCE)
        async with client.events() as events:
            async for event in events:
                if event.kind == "progress" and event.snapshot == image and event.reason:
                    say(printable(event.reason))

    return await run_alongside(work, tell())


async def _image_followed(sandbox: AsyncSandbox, *, as_json: bool) -> int:
    """Show what a command that was started has written, and writes, until it ends; its code."""
    from ratoon.cli.session import collect, follow

    assert sandbox.run is not None
    assert sandbox.run.pid is not None
    async with await sandbox.commands.connect(sandbox.run.pid) as running:
        if not as_json:
            return await follow(running, stdin=False, on_terminal=False)
        result = await collect(running, None)
    print_json({**_as_json(sandbox, result), **_image_facts(sandbox)})
    return result.exit_code


async def _started(
    sandbox: AsyncSandbox,
    spec: CommandSpec,
    *,
    background: bool,
    terminal: tuple[int, int] | None = None,
) -> AsyncCommand:
    from ratoon.client.aio.pty import LOGIN_SHELL, TERM

    env = {"TERM": os.environ.get("TERM", TERM), **spec.env} if terminal else spec.env
    return await sandbox.commands.start(
        spec.argv or LOGIN_SHELL,
        stdin=spec.interactive,
        env=env,
        cwd=spec.cwd,
        user=spec.user,
        timeout=spec.timeout,
        terminal=terminal,
        background=background,
        main=spec.main,
        own_pids=spec.own_pids,
    )


async def _left_running(sandbox: AsyncSandbox, spec: CommandSpec) -> int:
    """The pid of the command, which goes on by itself."""
    async with await _started(sandbox, spec, background=True) as running:
        if running.pid is None:
            ended = await running.wait(check=False)
            raise InvalidInput(ended.reason or "the command could not be started")
        return running.pid
    raise AssertionError


async def _collected(sandbox: AsyncSandbox, spec: CommandSpec) -> NoReturn:
    """Print all about the command as JSON, once it has ended; Exit with its exit code."""
    from ratoon.cli.session import collect

    stdin = sys.stdin.buffer.read() if spec.interactive else None
    async with await _started(sandbox, spec, background=False) as running:
        result = await collect(running, stdin)
    info = sandbox.info
    took = {
        "timed_out": result.timed_out,
        "stages_ms": {**info.stages_ms, "fork": info.fork_ms},
    }
    print_json({**_as_json(sandbox, result), **took, **_image_facts(sandbox)})
    raise typer.Exit(result.exit_code)


def _as_json(sandbox: AsyncSandbox, result: CommandResult) -> dict[str, Any]:
    """All about a command that has ended."""
    return {
        "sandbox": sandbox.id,
        "exit_code": result.exit_code,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "error": result.reason,
        "truncated": result.truncated,
    }


def _image_facts(sandbox: AsyncSandbox) -> dict[str, Any]:
    """How an image was run, for JSON; nothing if it was a snapshot."""
    if sandbox.run is None:
        return {}
    return {"run": asdict(sandbox.run)}


async def _followed(sandbox: AsyncSandbox, spec: CommandSpec) -> int | None:
    """The exit code of the command; None: it is left running."""
    from ratoon.cli.session import Detached, abandon, follow, size_here

    size = size_here() if spec.tty else None
    # On a terminal it can be left, so it must be able to go on.
    async with await _started(sandbox, spec, background=spec.tty, terminal=size) as running:
        try:
            return await follow(running, stdin=spec.interactive, on_terminal=spec.tty)
        except Detached:
            say(f"\r\ndetached; `ratoon attach {sandbox.id} {running.pid}` goes on")
            return None
        except BaseException:
            await abandon(running)
            raise
    raise AssertionError
