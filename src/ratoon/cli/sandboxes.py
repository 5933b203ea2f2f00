"""The verbs about sandboxes as a whole: made, listed, changed, ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratoon.api.answers import LOOPBACK, ListedState
from ratoon.api.defaults import STOP_SECONDS
from ratoon.cli.app import Json, complain, explain, print_json, say
from ratoon.cli.connect import all_of, client_command
from ratoon.cli.naming import NAME, Sandbox, Sandboxes, find, known_ids, known_tags
from ratoon.cli.options import Label, published, seconds
from ratoon.cli.showing import age, printable, tell_unsynced
from ratoon.errors import InvalidInput, RatoonError

if TYPE_CHECKING:
    from ratoon.api.answers import PublishedPort, SandboxInfo
    from ratoon.client.aio.client import AsyncClient, AsyncSandbox
    from ratoon.client.options import Options

Many = Annotated[int, typer.Option("-n", min=1, max=1000, metavar="N", help="How many.")]


@client_command("spawn")
async def spawn(
    client: AsyncClient,
    tag: Annotated[str, typer.Option(help="The snapshot to fork.", autocompletion=known_tags)],
    options: Options,
    n: Many = 1,
    as_json: Json = False,
) -> None:
    """Fork a snapshot many times, and print the sandboxes' ids.

    Exit code 1 if some of them could not be made.
    """
    _show_forks(await client.fork(tag, n, **options), as_json)


@client_command("fork")
async def fork(
    client: AsyncClient,
    sandbox: Sandbox,
    options: Options,
    n: Many = 1,
    no_volumes: Annotated[
        bool, typer.Option("--no-volumes", help="The forks get none of the sandbox's volumes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fork a sandbox as it is now; it goes on.

    What is not said of the forks is as with the sandbox. Exit code 1 if some could not be made.
    """
    if no_volumes and "volumes" in options:
        raise InvalidInput("--no-volumes and -v: say which volumes the forks are to have, or none")
    if no_volumes:
        options["volumes"] = []
    chosen = await find(client, sandbox)
    metadata = {**chosen.info.metadata, **options.get("metadata", {})}
    metadata.pop(NAME, None)
    options["metadata"] = metadata
    _show_forks(await chosen.fork(n, **options), as_json)


def _show_forks(made: Sequence[AsyncSandbox | RatoonError], as_json: bool) -> None:
    alive = [each for each in made if not isinstance(each, RatoonError)]
    failed = [each for each in made if isinstance(each, RatoonError)]
    if as_json:
        print_json([asdict(each.info) for each in alive])
    else:
        for each in alive:
            print(each.id)
    for error in failed:
        complain(explain(error))
    if failed:
        raise typer.Exit(1)


State = Annotated[ListedState | None, typer.Option(help="Those alone.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Ids alone.")]


@client_command("ps")
@client_command("ls")
async def list_sandboxes(
    client: AsyncClient,
    label: Label = None,
    state: State = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List the sandboxes."""
    found = await client.sandboxes(metadata=dict(label or []), state=state)
    if as_json:
        print_json([asdict(each) for each in found])
    elif quiet:
        for each in found:
            print(each.id)
    else:
        _show_table(found)


def _show_table(found: Sequence[SandboxInfo]) -> None:
    from ratoon.cli.screen import columns, show

    table = columns("ID", "NAME", "SNAPSHOT", "STATE", "AGE", "NETWORK", "PORTS", "LABELS")
    for each in found:
        labels = [f"{key}={value}" for key, value in each.metadata.items() if key != NAME]
        ports = [f"{_place(port)}:{port.guest_port}" for port in each.ports]
        table.add_row(
            each.id,
            printable(each.metadata.get(NAME, "-")),
            each.snapshot_tag,
            each.status,
            age(time.time() - each.created_at_unix),
            each.network,
            " ".join(ports) or "-",
            printable(" ".join(labels)) or "-",
        )
    show(table)


@client_command("kill")
async def kill(
    client: AsyncClient,
    sandboxes: Annotated[
        list[str] | None,
        typer.Argument(metavar="SANDBOX", help="Their ids or names.", autocompletion=known_ids),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All sandboxes.")] = False,
    tag: Annotated[str | None, typer.Option(help="Those forked from this snapshot.")] = None,
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait until their volumes have all data.")
    ] = False,
) -> None:
    """End sandboxes, and remove all they had.

    What they have written to their volumes is there then; where it may not be, a line says why.
    """
    if bool(sandboxes) + everything + (tag is not None) != 1:
        raise InvalidInput("say which: by SANDBOX, or --tag, or --all")
    if not sandboxes:
        found = await client.sandboxes()
        sandboxes = [each.id for each in found if tag in (None, each.snapshot_tag)]

    async def end(sandbox: AsyncSandbox) -> None:
        await sandbox.kill(now=now)
        say(f"killed {sandbox.id}")
        tell_unsynced(sandbox)

    await _each(client, sandboxes, end)


@client_command("stop")
async def stop(
    client: AsyncClient,
    sandboxes: Sandboxes,
    grace: Annotated[
        float | None,
        typer.Option("--time", "-t", parser=seconds, metavar="TIME", help="In place of 10 s."),
    ] = None,
) -> None:
    """Have the commands end that sandboxes were made for, and then the sandboxes.

    A command gets SIGTERM, or what its image or --stop-signal says, and 10 s. What it leaves behind
    gets that too; then all is killed, as by `ratoon kill`. In standby a sandbox is killed as it is,
    unless it is there because it idled.
    """

    async def end(sandbox: AsyncSandbox) -> None:
        ended = await sandbox.stop(STOP_SECONDS if grace is None else grace)
        say(f"stopped {sandbox.id}" + (f": exited ({ended.exit_code})" if ended else ""))
        tell_unsynced(sandbox)

    await _each(client, sandboxes, end)


@client_command("wait")
async def wait(client: AsyncClient, sandboxes: Sandboxes, as_json: Json = False) -> None:
    """Wait until the commands end that sandboxes were made for, and print their exit codes.

    In the order of the sandboxes. 137: it was killed with its sandbox.
    """
    ended: dict[str, dict[str, Any]] = {}

    async def one(name: str) -> None:
        sandbox = await find(client, name)
        ended[name] = {"sandbox": sandbox.id, **asdict(await sandbox.wait())}

    try:
        await all_of(one(name) for name in sandboxes)
    finally:
        found = [ended[name] for name in sandboxes if name in ended]
        if as_json:
            print_json(found)
        else:
            for each in found:
                print(each["exit_code"])


@client_command("standby")
async def standby(client: AsyncClient, sandboxes: Sandboxes) -> None:
    """Put sandboxes to standby: on the disk, out of the memory."""
    await _each(client, sandboxes, _changing("standby"))


@client_command("resume")
async def resume(client: AsyncClient, sandboxes: Sandboxes) -> None:
    """Let sandboxes in standby go on."""
    await _each(client, sandboxes, _changing("resume"))


@client_command("reset")
async def reset(client: AsyncClient, sandboxes: Sandboxes) -> None:
    """Take sandboxes back to their last branch, or their snapshot."""
    await _each(client, sandboxes, _changing("reset"))


def _changing(what: str) -> Callable[[AsyncSandbox], Coroutine[Any, Any, None]]:
    async def change(sandbox: AsyncSandbox) -> None:
        stages = await getattr(sandbox, what)()
        say(f"{what} of {sandbox.id}: {sum(stages.values()):.0f} ms")
        tell_unsynced(sandbox)

    return change


async def _each(
    client: AsyncClient,
    names: Sequence[str],
    change: Callable[[AsyncSandbox], Coroutine[Any, Any, None]],
) -> None:
    """Change each of them, as `all_of` does."""

    async def one(name: str) -> None:
        await change(await find(client, name))

    await all_of(one(name) for name in names)


@client_command("port")
async def port(
    client: AsyncClient,
    sandbox: Sandbox,
    wanted: Annotated[
        str | None, typer.Argument(metavar="[[ADDRESS:]HOST:]GUEST", help="The port to publish.")
    ] = None,
    close: Annotated[
        int | None, typer.Option(metavar="GUEST", help="Close those that lead there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show, publish or close ports of a sandbox.

    A published port is one of 127.0.0.1 on the daemon's host, unless ADDRESS is another of its
    addresses, and leads to one of the guest's loopback, whatever its network may be.
    """
    chosen = await find(client, sandbox)
    if wanted is not None and close is not None:
        raise InvalidInput("--close closes a port, and to name one publishes it: do one of them")
    if close is not None:
        await chosen.ports.unpublish(close)
        return
    if wanted is None:
        ports = await chosen.ports.list()
    else:
        try:
            guest, place = published(wanted)
        except typer.BadParameter as error:
            raise InvalidInput(error.message) from None
        address, host = place if isinstance(place, tuple) else (None, place)
        ports = [await chosen.ports.publish(guest, host, address)]
    _show_ports(ports, as_json)


def _show_ports(ports: Sequence[PublishedPort], as_json: bool) -> None:
    if as_json:
        print_json([asdict(each) for each in ports])
        return
    for each in ports:
        print(f"{_bracketed(each.address)}:{each.host_port} -> {each.guest_port}")


def _place(port: PublishedPort) -> str:
    """Of the host; where it is the loopback that is not said."""
    own = "" if port.address == LOOPBACK else f"{_bracketed(port.address)}:"
    return f"{own}{port.host_port}"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


@client_command("top")
async def top(client: AsyncClient, sandbox: Sandbox, as_json: Json = False) -> None:
    """Show the commands of a sandbox.

    Those that were started from outside and run, and those in the background that have ended.
    """
    found = await (await find(client, sandbox)).commands.list()
    if as_json:
        print_json([asdict(each) for each in found])
        return
    print(f"{'PID':>7}  {'USER':8}  {'STATE':10}  COMMAND")
    for each in found:
        ended = f"exit {each.exit_code}"
        state = ended if each.exit_code is not None else "attached" if each.attached else "running"
        print(f"{each.pid:7}  {each.user:8}  {state:10}  {printable(' '.join(each.argv))}")
