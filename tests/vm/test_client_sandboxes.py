"""The library on real machines, with asyncio and without, over a unix socket and over TCP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from served_daemon import Served
from vm_helpers import FOR_EVER

from both_libraries import Libraries
from ratoon.api.answers import CommandEnd, Limits, MainCommand
from ratoon.errors import (
    AlreadyExists,
    CommandFailed,
    Conflict,
    GuestError,
    GuestFileExists,
    GuestFileNotFound,
    InvalidInput,
    NotFound,
)
from ratoon.units import MIB

pytest_plugins = ["daemon_plugin"]


@pytest.fixture(scope="module", params=["asyncio", "threads"])
def library(request: pytest.FixtureRequest) -> Libraries:
    return Libraries(request.param)


@pytest.fixture(scope="module")
async def client(library: Libraries, served: Served) -> AsyncIterator[Any]:
    url = f"unix://{served.socket}" if library.kind == "asyncio" else served.url
    async with library.AsyncClient(url) as client:
        yield client


@pytest.fixture(scope="module")
async def box(library: Libraries, client: Any) -> AsyncIterator[Any]:
    """A sandbox that the tests of this module share."""
    async with await library.AsyncSandbox.create("base", client=client) as sandbox:
        yield sandbox
    with pytest.raises(NotFound):
        await client.sandbox(sandbox.id)


# Commands -----------------------------------------------------------------------------------------


async def test_a_command_and_what_it_writes(box: Any) -> None:
    pieces: list[tuple[str, str]] = []
    result = await box.commands.run(
        "echo out; echo $WHO >&2; pwd; printf '\\303'; sleep 0.1; printf '\\244\\377'",
        env={"WHO": "me"},
        cwd="/usr",
        on_stdout=lambda text: pieces.append(("out", text)),
        on_stderr=lambda text: pieces.append(("err", text)),
    )
    assert result.exit_code == 0
    assert (result.stdout, result.stderr) == ("out\n/usr\nä\N{REPLACEMENT CHARACTER}", "me\n")
    assert result.stdout_bytes == b"out\n/usr\n\xc3\xa4\xff"
    assert "".join(text for kind, text in pieces if kind == "out") == result.stdout
    assert "".join(text for kind, text in pieces if kind == "err") == result.stderr


async def test_a_listener_may_be_awaited(library: Libraries, box: Any) -> None:
    if library.kind == "threads":
        return
    heard: list[str] = []

    async def hear(text: str) -> None:
        await asyncio.sleep(0)
        heard.append(text)

    await box.commands.run(["echo", "hello"], on_stdout=hear)
    assert heard == ["hello\n"]


async def test_a_command_that_fails(box: Any) -> None:
    with pytest.raises(CommandFailed, match=r"exit 3.*no good") as failed:
        await box.commands.run("echo no good >&2; echo out; exit 3")
    assert failed.value.status == 3
    assert (failed.value.stdout, failed.value.stderr) == ("out\n", "no good\n")
    result = await box.commands.run("exit 3", check=False)
    assert result.exit_code == 3
    missing = await box.commands.run(["no-such-program"], check=False)
    assert missing.exit_code == 127
    assert "no-such-program" in missing.reason
    slow = await box.commands.run(["sleep", "1000"], timeout=0.2, check=False)
    assert (slow.exit_code, slow.timed_out) == (124, True)
    with pytest.raises(InvalidInput, match="nobody-here"):
        await box.commands.run("id", user="nobody-here")
    assert (await box.commands.run("id -un", user="nobody")).stdout == "nobody\n"


async def test_both_directions_at_once(box: Any) -> None:
    """More than all buffers on the way hold, of what a program gives back while it takes it."""
    data = bytes(range(256)) * (16 * MIB // 256)
    result = await box.commands.run("cat", stdin=data)
    assert result.stdout_bytes == data


async def test_a_program_that_takes_no_input(box: Any) -> None:
    result = await box.commands.run("exec <&-; echo done", stdin=b"x" * MIB)
    assert result.stdout == "done\n"


async def test_in_the_background(box: Any) -> None:
    running = await box.commands.run(
        "while read line; do echo got $line; done; exit 7", background=True, stdin=True
    )
    (listed,) = [each for each in await box.commands.list() if each.pid == running.pid]
    assert (listed.background, listed.attached, listed.exit_code) == (True, True, None)
    await running.send_stdin("one\n")
    async for output in running:
        assert (output.stream, output.data) == ("stdout", b"got one\n")
        break
    await running.disconnect()
    again = await box.commands.connect(running.pid)
    await again.send_stdin(b"two\n")
    await again.close_stdin()
    result = await again.wait(check=False)
    assert result.exit_code == 7
    assert result.stdout.endswith("got two\n")
    with pytest.raises(NotFound):
        await box.commands.connect(running.pid + 100_000)


async def test_killing_what_runs(box: Any) -> None:
    running = await box.commands.run(["sleep", "1000"], background=True)
    await box.commands.kill(running.pid)
    assert (await running.wait(check=False)).exit_code == 137
    with pytest.raises((NotFound, Conflict)):
        await box.commands.kill(running.pid)


async def test_who_gives_up_ends_the_command(library: Libraries, box: Any) -> None:
    if library.kind == "threads":
        return
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(box.commands.run(["sleep", "987"]), 0.5)
    gone = "while pgrep -f 'sleep [9]87' >/dev/null; do sleep 0.05; done"
    await box.commands.run(gone, timeout=FOR_EVER)


async def test_a_terminal(box: Any) -> None:
    async with await box.pty.create(["sh"], rows=30, columns=100) as terminal:
        await terminal.send_stdin("stty size; echo $TERM\n")
        seen = b""
        async for output in terminal:
            seen += output.data
            if b"xterm" in seen.partition(b"30 100")[2]:
                break
        await terminal.resize(40, 120)
        await terminal.send_stdin("stty size; exit 5\n")
        result = await terminal.wait(check=False)
    assert "40 120" in result.stdout
    assert result.exit_code == 5


# Code ---------------------------------------------------------------------------------------------


async def test_code_keeps_its_state(box: Any) -> None:
    await box.eval("x = 6")
    heard: list[str] = []
    done = await box.run_code("print('hé'); x * 7", on_stdout=heard.append)
    assert (done.result, done.error, done.stdout, "".join(heard)) == ("42", None, "hé\n", "hé\n")
    failed = await box.eval("1 / 0")
    assert failed.exit_code == 1
    assert "ZeroDivisionError" in failed.error
    slow = await box.eval("while True: pass", timeout=0.5)
    assert slow.timed_out
    assert (await box.eval("x")).result == "6"


# Files --------------------------------------------------------------------------------------------


async def test_files(box: Any) -> None:
    files = box.files
    assert await files.write("/root/new/text", "grün\n", mode=0o640) == 6
    assert await files.read("/root/new/text") == "grün\n"
    assert await files.append("/root/new/text", b"\xff") == 1
    assert await files.read("/root/new/text", "bytes", offset=5) == b"\n\xff"
    status = await files.stat("/root/new/text")
    assert (status.type, status.size_bytes, status.mode) == ("file", 7, 0o640)
    await files.write(b"/root/new/\xff name?&", b"odd")
    assert await files.read("/root/new/\udcff name?&") == "odd"
    await files.symlink("/root/new/link", "text")
    names = [each.path.rpartition("/")[2] for each in await files.list("/root/new")]
    assert sorted(names) == ["link", "text", "\udcff name?&"]
    assert (await files.stat("/root/new/link", follow_symlinks=False)).target == "text"
    await files.change("/root/new/text", mode=0o600, mtime_ns=10**9)
    assert (await files.stat("/root/new/text")).mtime_ns == 10**9
    await files.rename("/root/new/text", "/root/new/moved")
    assert await files.exists("/root/new/moved")
    assert not await files.exists("/root/new/text")
    with pytest.raises(GuestFileExists):
        await files.remove("/root/new")
    await files.remove("/root/new", recursive=True)
    await files.remove("/root/new", missing_ok=True)
    with pytest.raises(GuestFileNotFound, match="/root/new"):
        await files.read("/root/new")


async def test_a_large_file_comes_in_pieces(box: Any) -> None:
    await box.files.write("/root/large", b"0123456789abcdef" * 65536)
    async with box.files.reading("/root/large", offset=16, length=MIB - 32) as pieces:
        content = b"".join([piece async for piece in pieces])
    assert content == b"0123456789abcdef" * 65534
    async with box.files.reading("/root/large") as pieces:
        async for piece in pieces:
            assert piece.startswith(b"0123")
            break


async def test_trees_there_and_back(box: Any, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/file").write_bytes(b"x" * MIB)
    (tree / "sub/file").chmod(0o751)
    (tree / "link").symlink_to("sub/file")
    counts: list[int] = []
    sent = await box.files.upload(tree, "/root/up/tree", on_bytes=counts.append)
    assert (sent.entries, sent.left_out) == (4, [])
    assert counts[-1] == sent.size_bytes > MIB
    await box.commands.run("mkfifo /root/up/tree/pipe; ln /root/up/tree/sub/file /root/up/tree/b")
    back = tmp_path / "back"
    await box.files.download("/root/up/tree", back)
    assert (back / "sub/file").read_bytes() == b"x" * MIB
    assert (back / "sub/file").stat().st_mode & 0o777 == 0o751
    assert (back / "b").samefile(back / "sub/file")
    assert (back / "link").readlink() == Path("sub/file")
    assert not (back / "pipe").exists()
    with pytest.raises(AlreadyExists, match="merge"):
        await box.files.download("/root/up/tree", back)
    (back / "own").touch()
    await box.files.download("/root/up/tree", back, merge=True)
    assert (back / "own").exists()


async def test_single_files_there_and_back(box: Any, tmp_path: Path) -> None:
    (tmp_path / "program").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "program").chmod(0o755)
    await box.files.upload(tmp_path / "program", "/opt/new/program")
    assert (await box.commands.run(["/opt/new/program"])).stdout == "ran\n"
    await box.files.download("/opt/new/program", tmp_path / "back")
    assert (tmp_path / "back").read_text() == "#!/bin/sh\necho ran\n"
    assert (tmp_path / "back").stat().st_mode & 0o777 == 0o755
    local, remote = (tmp_path / "program").stat(), await box.files.stat("/opt/new/program")
    assert remote.mtime_ns == local.st_mtime_ns
    with pytest.raises(NotFound, match="on this host"):
        await box.files.upload(tmp_path / "absent", "/root/absent")


async def test_watching(box: Any) -> None:
    await box.files.make_dir("/root/watched/below")
    async with box.files.watch("/root/watched", recursive=True) as events:
        await box.commands.run("mv /etc/motd /root/watched/below/moved 2>/dev/null || true")
        await box.commands.run("echo >/root/watched/below/made")
        async for event in events:
            if event.path == "/root/watched/below/made":
                assert (event.kind, event.is_directory) == ("created", False)
                break
    with pytest.raises(GuestFileNotFound):
        async with box.files.watch("/root/nowhere"):
            pass


# Ports --------------------------------------------------------------------------------------------


async def test_ports(box: Any) -> None:
    server = await box.commands.run(
        ["python3", "-u", "-c", ECHO_SERVER], background=True, timeout=FOR_EVER
    )
    async for output in server:
        assert output.data.startswith(b"listening")
        break
    async with box.ports.dial(7000) as connection:
        await connection.send(b"x" * MIB)
        await connection.end()
        received = b""
        while piece := await connection.receive():
            received += piece
        assert received == b"x" * MIB
    published = await box.ports.publish(7000)
    assert await box.ports.list() == [published]
    reader, writer = await asyncio.open_connection("127.0.0.1", published.host_port)
    writer.write(b"hello")
    writer.write_eof()
    assert await reader.read() == b"hello"
    writer.close()
    await writer.wait_closed()
    await box.ports.unpublish(7000)
    with pytest.raises(NotFound):
        await box.ports.unpublish(7000)
    await server.kill()
    await server.wait(check=False)
    with pytest.raises(GuestError, match="refused"):
        async with box.ports.dial(7000):
            pass


ECHO_SERVER = """
import socket
listener = socket.create_server(("127.0.0.1", 7000))
print("listening")
while True:
    connection, _ = listener.accept()
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)
"""


# What becomes of sandboxes ------------------------------------------------------------------------


async def test_options_are_told_and_changed(library: Libraries, client: Any) -> None:
    async with await library.AsyncSandbox.create(
        "base", client=client, timeout=600, idle=300, metadata={"who": "me"}, cpus=1.5
    ) as sandbox:
        info = await sandbox.refresh()
        assert (info.ttl_seconds, info.idle_seconds) == (600, 300)
        assert (info.metadata, info.limits) == ({"who": "me"}, Limits(cpus=1.5))
        (found,) = await library.AsyncSandbox.list(metadata={"who": "me"}, client=client)
        assert found.id == sandbox.id
        await sandbox.set_timeout(None)
        await sandbox.set_idle(100)
        await sandbox.set_metadata({"who": "you"})
        assert (sandbox.info.ttl_seconds, sandbox.info.idle_seconds) == (None, 100)
        assert await library.AsyncSandbox.list(metadata={"who": "me"}, client=client) == []
        same = await library.AsyncSandbox.connect(sandbox.id, client=client)
        assert await same.kill()
        assert not await sandbox.kill()


async def test_wait_and_stop(library: Libraries, client: Any) -> None:
    create = library.AsyncSandbox.create
    async with await create("base", client=client, stop_signal="USR1") as sandbox:
        with pytest.raises(Conflict, match="has no command"):
            await sandbox.wait()
        script = "trap 'exit 3' USR1; echo begun; while :; do sleep 0.05; done"
        started = sandbox.commands.start(["sh", "-c", script], background=True, main=True)
        async with await started as command:
            assert (await command.read()).data == b"begun\n"
        assert (await sandbox.refresh()).command == MainCommand(command.pid)
        assert await sandbox.stop() == CommandEnd(3)
        assert not await sandbox.kill()
    async with await create("base", client=client) as sandbox:
        async with await sandbox.commands.start(["sh", "-c", "exit 5"], main=True):
            assert await sandbox.wait() == CommandEnd(5)
        assert (await sandbox.refresh()).status == "exited (5)"


async def test_forks_of_a_sandbox_share_its_past_alone(library: Libraries, client: Any) -> None:
    async with await library.AsyncSandbox.create("base", client=client) as root:
        await root.eval("path = ['root']")
        forks = await root.fork(2, metadata={"kind": "fork"})
        for number, fork in enumerate(forks):
            await fork.eval(f"path.append({number})")
        assert [(await fork.eval("path")).result for fork in forks] == [
            "['root', 0]",
            "['root', 1]",
        ]
        assert (await root.eval("path")).result == "['root']"
        assert {fork.info.metadata["kind"] for fork in forks} == {"fork"}
        for fork in forks:
            await fork.kill()


async def test_branch_reset_standby(library: Libraries, client: Any) -> None:
    tag = f"made-{library.kind}"
    async with await library.AsyncSandbox.create("base", client=client) as sandbox:
        await sandbox.files.write("/root/state", "kept")
        made = await sandbox.branch(tag)
        assert (made.tag, made.parent_tag, made.status) == (tag, "base", "ready")
        with pytest.raises(AlreadyExists):
            await sandbox.branch(tag)
        await sandbox.files.write("/root/state", "lost")
        assert "rebirth" in await sandbox.reset()
        assert await sandbox.files.read("/root/state") == "kept"
        await sandbox.standby()
        assert sandbox.info.state == "standby"
        with pytest.raises(Conflict, match="standby"):
            await sandbox.commands.run("true")
        await sandbox.resume()
        assert await sandbox.files.read("/root/state") == "kept"
        async with await library.AsyncSandbox.create(tag, client=client) as other:
            assert await other.files.read("/root/state") == "kept"


async def test_without_a_client_it_has_one_and_shares_it_with_its_forks(
    library: Libraries, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATOON_URL", served.url)
    async with await library.AsyncSandbox.create("base", timeout=600) as sandbox:
        (fork,) = await sandbox.fork()
    async with fork:
        assert fork.info.ttl_seconds == 600
        assert (await fork.commands.run("hostname")).stdout == f"{fork.id}\n"
        assert fork.id in {each.id for each in await library.AsyncSandbox.list()}
    assert fork.id not in {each.id for each in await library.AsyncSandbox.list()}
