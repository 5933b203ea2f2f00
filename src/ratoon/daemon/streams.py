"""The WebSockets of what runs in a sandbox: commands, code, changes of files, connections.

What one side does not take, the other does not send: that holds up nobody else.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, WebSocket

from ratoon.concurrency import run_alongside
from ratoon.daemon.context import TheDaemon
from ratoon.daemon.conversation import Conversation, conversation
from ratoon.daemon.models.commands import EvalOpening, ExecOpening, ExecSaying
from ratoon.daemon.requests import raw_parameter
from ratoon.errors import InvalidInput
from ratoon.machine.guest import commands
from ratoon.machine.guest.channel import GuestStream
from ratoon.machine.guest.commands import Command
from ratoon.machine.guest.evaluation import evaluate
from ratoon.machine.guest.files import GuestFiles
from ratoon.machine.guest.shared import wire

router = APIRouter()

#: What output begins with.
STDOUT, STDERR = b"\x01", b"\x02"


@router.websocket("/v1/sandboxes/{sandbox_id}/exec/stream")
async def stream_command(socket: WebSocket, sandbox_id: str, daemon: TheDaemon) -> None:
    """Start a program, or attach to one, and be its terminal."""
    async with conversation(socket) as client:
        wanted = await client.opening(ExecOpening)
        sandbox = daemon.engine.get(sandbox_id)
        if wanted.attach is not None:
            running = commands.attach(sandbox, wanted.attach)
        else:
            running = commands.start(
                sandbox,
                wanted.argv,
                env=wanted.env,
                cwd=wanted.cwd,
                user=wanted.user,
                stdin=wanted.stdin,
                terminal=(wanted.pty.rows, wanted.pty.columns) if wanted.pty else None,
                background=wanted.background,
                timeout=wanted.timeout,
                main=wanted.main,
                own_pids=wanted.own_pids,
            )
        async with running as command:
            await client.send_json(started={"pid": command.pid})
            await run_alongside(_output(command, client), _input(client, command))
            ended = await command.wait()
        await client.send_json(
            exit={
                "exit_code": ended.exit_code,
                "timed_out": ended.timed_out,
                "reason": ended.error,
            }
        )


async def _output(command: Command, client: Conversation) -> None:
    while (piece := await command.read()) is not None:
        kind, data = piece
        await client.send(data, prefix=STDOUT if kind == wire.STDOUT else STDERR)


async def _input(client: Conversation, command: Command) -> None:
    while True:
        said = await client.receive()
        if isinstance(said, bytes):
            await client.while_there(command.write(said))
            continue
        wish = ExecSaying.model_validate(said)
        if wish.eof:
            command.end_input()
        if wish.resize:
            command.resize(wish.resize.rows, wish.resize.columns)
        if wish.signal is not None:
            command.signal(wish.signal)


@router.websocket("/v1/sandboxes/{sandbox_id}/eval/stream")
async def stream_evaluation(socket: WebSocket, sandbox_id: str, daemon: TheDaemon) -> None:
    """Run Python in the warm interpreter, and hear its output as it comes."""
    async with conversation(socket) as client:
        wanted = await client.opening(EvalOpening)

        async def on_stdout(data: bytes) -> None:
            await client.send(data, prefix=STDOUT)

        async def on_stderr(data: bytes) -> None:
            await client.send(data, prefix=STDERR)

        work = evaluate(
            daemon.engine.get(sandbox_id),
            wanted.code,
            timeout=wanted.timeout,
            on_stdout=on_stdout,
            on_stderr=on_stderr,
        )
        done = await run_alongside(work, client.until_gone())
        await client.send_json(
            exit={
                "result": done.result,
                "error": done.error,
                "exit_code": done.exit_code,
                "timed_out": done.timed_out,
                "state_lost": done.state_lost,
                "truncated": done.truncated,
            }
        )


@router.websocket("/v1/sandboxes/{sandbox_id}/files/watch")
async def stream_changes(
    socket: WebSocket, sandbox_id: str, daemon: TheDaemon, path: str, recursive: bool = False
) -> None:
    """Hear what happens in a directory, until either side closes."""
    async with conversation(socket) as client:
        files = GuestFiles(daemon.engine.get(sandbox_id))
        async with files.watch(raw_parameter(socket, "path"), recursive=recursive) as events:
            await client.send_json(started={})

            async def tell() -> None:
                async for event in events:
                    fields: dict[str, Any] = {
                        "kind": event.kind,
                        "path": event.path,
                        "is_directory": event.is_directory,
                        "old_path": event.old_path,
                    }
                    await client.send_json(event=fields)

            await run_alongside(tell(), client.until_gone())


@router.websocket("/v1/sandboxes/{sandbox_id}/dial/{port}")
async def stream_connection(
    socket: WebSocket, sandbox_id: str, port: int, daemon: TheDaemon
) -> None:
    """A TCP connection to a port in the guest: bytes both ways, and the end of each."""
    async with (
        conversation(socket) as client,
        commands.dial(daemon.engine.get(sandbox_id), port) as stream,
    ):
        await client.send_json(started={})
        await run_alongside(_from_port(stream, client), _to_port(client, stream))


async def _from_port(stream: GuestStream, client: Conversation) -> None:
    while (piece := await stream.read()) is not None:
        if piece[1]:
            await client.send(piece[1])
        else:
            await client.send_json(eof=True)


async def _to_port(client: Conversation, stream: GuestStream) -> None:
    while True:
        said = await client.receive()
        if isinstance(said, bytes):
            await client.while_there(stream.write(said))
        elif said == {"eof": True}:
            stream.end_input()
        else:
            raise InvalidInput(f"{said}: on a connection there is only the eof to be said")
