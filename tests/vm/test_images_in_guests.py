"""Images of all kinds, from where images come: each boots, and runs what it has."""

from __future__ import annotations

import asyncio
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from vm_helpers import fork_of_image

import small_images
from oci_images import Layout, directory, entry, file, hard_link, layer, symlink
from ratoon import paths
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import InvalidInput, NoPython
from ratoon.machine.guest import commands
from ratoon.machine.guest.defaults import change_defaults
from ratoon.machine.guest.shared import wire
from ratoon.units import MIB
from registry_server import Registry, program, serving

#: Prints what processes there are that have ended, and whom nobody has waited for.
ZOMBIES = (
    "for each in /proc/[0-9]*/status; do while read key value; do case $key$value in "
    "State:Z*) echo $each;; esac; done <$each; done 2>/dev/null; :"
)
PYTHON_ZOMBIES = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if "State:\\tZ" in open(f"/proc/{pid}/status").read(): print(pid)
    except OSError: pass
"""
#: `cap_net_bind_service=ep`, linux/capability.h: version 2, little-endian.
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000").decode("latin-1")
ABLE = {"security.capability": CAPABILITY}
#: What /etc/resolv.conf says where nothing outside is reached.
OFFLINE = "nameserver 10.0.2.3\noptions timeout:0"
CAPABILITIES = "while read k v; do case $k in CapEff:) echo $v;; esac; done </proc/self/status"


@dataclass(frozen=True)
class Shell:
    """How programs are run in an image: `run` is given a script, and the scripts to be given."""

    run: tuple[str, ...] = ("/bin/sh", "-c")
    fail: str = "exit 7"
    orphan: str = "/bin/sh -c 'exit 3' & exit 0"
    zombies: str = ZOMBIES
    wait: str = "echo ready; while :; do read line; done"
    echo: str = 'read line; echo "got $line"'


BASH = Shell(run=("bash", "-c"), orphan="bash -c 'exit 3' & exit 0")
PYTHON = Shell(
    run=("python3", "-c"),
    fail="raise SystemExit(7)",
    orphan="import os; os.fork() or os.fork() or os._exit(3)",
    zombies=PYTHON_ZOMBIES,
    wait="print('ready', flush=True); import signal; signal.pause()",
    echo="print('got', input())",
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What these images are made into goes with them; what all guests need is that of always."""
    small_images.python(), small_images.musl(), small_images.bash()  # their packages are kept
    own = tmp_path_factory.mktemp("cache")
    for kind in ("guest", "packages", "accelerators", "wheels"):
        (own / kind).symlink_to(paths.cache() / kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATOON_CACHE", str(own))
        yield


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with serving(program(), tmp_path_factory.mktemp("registry")) as registry:
        yield registry


def running(engine: Engine, image: str, disk: int = 256) -> AbstractAsyncContextManager[Sandbox]:
    """A fork of a base that is made of `image`, with a disk of so many MiB."""
    return fork_of_image(engine, image, ram=160, disk=disk)


def convert(layout: Layout, target: str) -> None:
    subprocess.run(["skopeo", "copy", "--quiet", layout.reference(), target], check=True)


def pack(tree: Path, tarball: Path) -> None:
    subprocess.run(["tar", "--zstd", "-C", tree, "-cf", tarball, "."], check=True)


async def check(sandbox: Sandbox, shell: Shell) -> None:
    """What must hold in every image."""
    failed = await sandbox.exec([*shell.run, shell.fail])
    assert (failed.exit_code, failed.error) == (7, None), failed
    missing = await sandbox.exec(["/no/such/program"])
    assert missing.exit_code == 127
    assert missing.error

    async with commands.start(sandbox, [*shell.run, shell.wait], stdin=True) as command:
        assert await command.read() == (wire.STDOUT, b"ready\n")
        command.signal(15)
        assert (await command.wait()).exit_code == 128 + 15

    async with commands.start(sandbox, [*shell.run, shell.echo], terminal=(24, 80)) as command:
        await command.write(b"typed\n")
        seen = b""
        while b"got typed" not in seen:
            piece = await command.read()
            assert piece is not None, seen
            seen += piece[1]
        assert (await command.wait()).exit_code == 0

    for _ in range(3):
        assert (await sandbox.exec([*shell.run, shell.orphan])).exit_code in (0, 3)
    deadline = time.monotonic() + 60
    while (left := await sandbox.exec([*shell.run, shell.zombies])).stdout:
        assert time.monotonic() < deadline, f"process 1 does not wait for {left.stdout!r}"
        await asyncio.sleep(0.05)
    assert left.exit_code == 0, left

    await sandbox.files.mkdir("/srv/a directory", parents=True)
    await sandbox.files.write("/srv/a directory/file", b"content")
    assert await sandbox.files.read("/srv/a directory/file") == b"content"
    assert "127.0.0.1" in (await sandbox.files.read("/etc/hosts")).decode()
    names = {Path(each.path).name for each in await sandbox.files.list("/")}
    assert {"proc", "sys", "dev", "run", "tmp", "etc", "srv"} <= names


async def no_python(sandbox: Sandbox) -> None:
    with pytest.raises(NoPython, match="the sandbox has no Python: cannot execute python3"):
        await sandbox.eval("1")


async def output(sandbox: Sandbox, *argv: str) -> str:
    """What a program prints; it must succeed."""
    result = await sandbox.exec([*argv])
    assert result.exit_code == 0, result
    return result.stdout.decode().strip()


async def test_glibc_with_python_from_a_registry(
    engine: Engine, registry: Registry, tmp_path: Path
) -> None:
    """Python is found by the image's own PATH, and evaluates as the image says."""
    layout = Layout(tmp_path)
    config = {
        "Env": ["PATH=/opt/bin:/usr/bin", "GREETING=hello world", "HOME=/elsewhere"],
        "WorkingDir": "/srv/app",
        "Cmd": ["python3"],
    }
    layout.add([small_images.python()], config)
    async with running(engine, registry.push(layout.reference(), "python:3.11")) as sandbox:
        await check(sandbox, PYTHON)
        code = "import os, sys; [os.getcwd(), os.environ['GREETING'], os.environ['HOME'], 6 * 7]"
        assert (await sandbox.eval(code)).result == "['/srv/app', 'hello world', '/elsewhere', 42]"
        await sandbox.eval("kept = 1")
        assert (await sandbox.eval("kept + 1")).result == "2"
        told = await sandbox.exec(
            ["python3", "-c", "import os; print(os.getcwd(), os.environ['GREETING'])"],
            env={"GREETING": "mine"},
            cwd="/",
        )
        assert told.stdout == b"/ mine\n"
        assert sandbox.parent is not None
        guest = sandbox.parent.manifest.guest
        assert guest.image == f"{registry.host}/python:3.11"
        assert guest.digest is not None
        assert guest.config.argv() == ["python3"]


async def test_user_environment_and_directory_are_the_images(
    engine: Engine, tmp_path: Path
) -> None:
    """Unless a command says otherwise; in forks, and after all that gives it another machine."""
    layout = Layout(tmp_path)
    users = [
        file("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"),
        file("etc/group", b"root:x:0:\napp:x:1000:\nweb:x:8:\n"),
    ]
    config = {"User": "app:web", "Env": ["SAID=image", "PATH=/bin"], "WorkingDir": "/srv/app"}
    layout.add([layer([*small_images.busybox(), *users])], config)
    script = ["sh", "-c", "echo $SAID $(id -un) $(id -gn) $(pwd)"]

    async def check_all(sandbox: Sandbox) -> None:
        assert await output(sandbox, *script) == "image app web /srv/app"
        said = await sandbox.exec(script, env={"SAID": "request"}, cwd="/tmp", user="root")
        assert said.stdout == b"request root root /tmp\n"

    async with running(engine, layout.reference()) as sandbox:
        await check_all(sandbox)
        await engine.reset(sandbox)
        await check_all(sandbox)
        await engine.standby(sandbox)
        await engine.resume(sandbox)
        await check_all(sandbox)
        (fork,) = await engine.fork_sandbox(sandbox)
        assert isinstance(fork, Sandbox)
        async with fork:
            await check_all(fork)


async def test_nothing_but_busybox(engine: Engine, tmp_path: Path) -> None:
    """No /etc, no user, no library."""
    layout = Layout(tmp_path)
    layout.add([layer(small_images.busybox())])
    async with running(engine, layout.reference()) as sandbox:
        await check(sandbox, Shell())
        await no_python(sandbox)
        assert await output(sandbox, "id", "-u") == "0"


async def test_musl(engine: Engine, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.add([layer(small_images.busybox()), layer(small_images.musl())])
    archive = f"oci-archive:{tmp_path}/musl.tar"
    convert(layout, archive)
    async with running(engine, archive) as sandbox:
        await check(sandbox, Shell())
        await no_python(sandbox)
        assert (await output(sandbox, "ninja", "--version")).startswith("1.13.0")
        assert (await sandbox.exec(["ninja", "-C", "/srv"])).exit_code == 1


async def test_glibc_without_python(engine: Engine, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.add([small_images.bash()], {"Cmd": ["bash"]})
    archive = f"docker-archive:{tmp_path}/bash.tar"
    convert(layout, f"{archive}:some/bash:1")
    async with running(engine, archive) as sandbox:
        await check(sandbox, BASH)
        await no_python(sandbox)


async def test_a_user_who_is_not_root(engine: Engine, tmp_path: Path) -> None:
    """Programs of all kinds run as that user, unless somebody asks for another."""
    layout = Layout(tmp_path)
    users = [
        directory("etc"),
        file("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1001:1002::/home/app:/bin/sh\n"),
        file("etc/group", b"root:x:0:\napp:x:1002:\nstaff:x:50:app\n"),
        directory("home/app", uid=1001, gid=1002),
        directory("srv", mode=0o777),
        directory("closed", mode=0o700),
    ]
    config = {"User": "app:staff", "WorkingDir": "/home/app"}
    layout.add([layer([*small_images.busybox(), *users])], config)
    async with running(engine, layout.reference()) as sandbox:
        await check(sandbox, Shell())
        script = "id -u; id -g; pwd; echo $HOME $USER; touch made; touch /bin/x 2>&1"
        told = await sandbox.exec(["sh", "-c", script])
        assert told.stdout.splitlines()[:4] == [b"1001", b"50", b"/home/app", b"/home/app app"]
        assert b"Permission denied" in told.stdout
        assert await output(sandbox, "stat", "-c", "%u:%g", "made") == "1001:50"
        closed = await sandbox.exec(["sh", "-c", "pwd; touch x"], cwd="/closed")
        assert (closed.exit_code, closed.stdout) == (1, b"/closed\n")
        assert b"Permission denied" in closed.stderr
        root = await sandbox.exec(["sh", "-c", "id -u; pwd; echo $HOME"], user="root")
        assert root.stdout == b"0\n/home/app\n/root\n"
        async with commands.start(sandbox, ["id", "-u"], terminal=(24, 80)) as command:
            assert await command.read() == (wire.STDOUT, b"1001\r\n")
        async with commands.start(sandbox, ["sleep", "1000"], background=True) as command:
            listed = {each.pid: each for each in await commands.processes(sandbox)}
            assert command.pid is not None
            assert listed[command.pid].user == "app:staff"
            await commands.signal(sandbox, command.pid, 9)


async def test_an_entrypoint_with_a_command(engine: Engine, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    entry_script = b'#!/bin/sh\necho "entered with $*, $FROM_IMAGE"\nexec "$@"\n'
    config = {
        "Entrypoint": ["/entry", "--"],
        "Cmd": ["sh", "-c", "exit 5"],
        "Env": ["FROM_IMAGE=yes"],
        "ExposedPorts": {"80/tcp": {}},
    }
    shifted = entry_script.replace(b"exec", b"shift\nexec")
    layout.add([layer([*small_images.busybox(), file("entry", shifted, 0o755)])], config)
    async with running(engine, layout.reference()) as sandbox:
        await check(sandbox, Shell())
        assert sandbox.parent is not None
        wants = sandbox.parent.manifest.guest.config
        ended = await sandbox.exec(wants.argv())
        assert ended.stdout == b"entered with -- sh -c exit 5, yes\n"
        assert ended.exit_code == 5
        assert (await sandbox.exec(wants.argv(["true"]))).exit_code == 0


async def test_a_large_layer(
    engine: Engine, registry: Registry, tmp_path: Path, soak: bool
) -> None:
    """A gibibyte in the long runs; it is fetched as what it is compressed."""
    size = 1024 * MIB if soak else 64 * MIB
    layout = Layout(tmp_path)
    layout.add([layer(small_images.busybox()), small_images.repeated("large", size)])
    name = registry.push(layout.reference(), "large:latest")
    async with running(engine, name, size // MIB + 256) as sandbox:
        await check(sandbox, Shell())
        assert await output(sandbox, "stat", "-c", "%s", "/large") == str(size)
        end = await sandbox.exec(["tail", "-c", "100", "/large"])
        assert end.stdout == small_images.PIECE[-100:]


async def test_many_small_layers(engine: Engine, registry: Registry, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    small = [layer([file(f"n/{n}", b"%d" % n), file("last", b"%d" % n)]) for n in range(60)]
    layout.add([layer(small_images.busybox()), *small])
    async with running(engine, registry.push(layout.reference(), "many:latest")) as sandbox:
        await check(sandbox, Shell())
        assert await output(sandbox, "cat", "/last") == "59"
        assert len((await output(sandbox, "ls", "/n")).splitlines()) == 60


async def test_layers_with_all_that_layers_can_have(engine: Engine, tmp_path: Path) -> None:
    """Whiteouts, links, owners, setuid, capabilities, devices: they are there, and they work."""
    layout = Layout(tmp_path)
    below = [
        *(directory("gone"), file("gone/x"), directory("opaque"), file("opaque/old")),
        *(file("owned", b"x", 0o640, uid=1234, gid=4321), hard_link("linked", "owned")),
        *(symlink("absolute", "/owned"), symlink("up", "../../../owned")),
        file("sbin/asroot", small_images.bash_program(), 0o4755),
        file("sbin/able", small_images.bash_program(), 0o755, xattrs=ABLE),
        *(symlink("tmp", "/etc"), symlink("etc/resolv.conf", "/run/nowhere")),
        entry("null", tarfile.CHRTYPE, mode=0o666, device=(1, 3)),
    ]
    above = [file(".wh.gone"), file("opaque/.wh..wh..opq"), file("opaque/new")]
    layout.add([small_images.bash(), layer([*small_images.busybox(), *below]), layer(above)])
    async with running(engine, layout.reference()) as sandbox:
        await check(sandbox, Shell())
        assert await output(sandbox, "ls", "/opaque") == "new"
        assert (await sandbox.exec(["ls", "/gone"])).exit_code == 1
        for name in ("owned", "linked", "absolute", "up"):
            assert (
                await output(sandbox, "stat", "-L", "-c", "%u:%g %h", f"/{name}") == "1234:4321 2"
            )
        assert (await sandbox.exec(["sh", "-c", "echo x >/null && ls /null"])).exit_code == 0
        as_root = await sandbox.exec(["/sbin/asroot", "-p", "-c", "echo $UID $EUID"], user="1000")
        assert as_root.stdout == b"1000 0\n"
        capabilities = await sandbox.exec(["/sbin/able", "-c", CAPABILITIES], user="1000")
        assert int(capabilities.stdout, 16) == 1 << 10  # CAP_NET_BIND_SERVICE
        assert await output(sandbox, "cat", "/etc/resolv.conf") == OFFLINE


async def test_a_tree_of_this_host(engine: Engine, tmp_path: Path) -> None:
    """As a tarball, of a directory that has a program alone, and no shell."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (tmp_path / "tree/busybox").chmod(0o755)
    packed = tmp_path / "root.tar.zst"
    pack(tmp_path / "tree", packed)
    async with running(engine, f"tar:{packed}") as sandbox:
        await check(
            sandbox, Shell(run=("/busybox", "sh", "-c"), orphan="/busybox sh -c 'exit 3' & exit 0")
        )
        await no_python(sandbox)


async def test_defaults_are_for_what_a_request_does_not_say(sandbox: Sandbox) -> None:
    await change_defaults(sandbox, {"SAID": "image"}, "daemon", "made/for/it")
    script = ["sh", "-c", "echo $SAID $(id -un) $(pwd)"]
    assert await output(sandbox, *script) == "image daemon /made/for/it"
    said = await sandbox.exec(script, env={"SAID": "request"}, cwd="/tmp", user="root")
    assert said.stdout == b"request root /tmp\n"
    for user, workdir, what in (
        ("nobody-here", None, "no user 'nobody-here'"),
        ("daemon:nothing", None, "no group 'nothing'"),
        (None, "/etc/passwd", "/etc/passwd cannot be made"),
    ):
        with pytest.raises(InvalidInput, match=what):
            await change_defaults(sandbox, {}, user, workdir)
    assert await output(sandbox, *script) == "image daemon /made/for/it"
    await change_defaults(sandbox, {"SAID": "more", "NEW": "one"}, "root", None)
    assert await output(sandbox, *script) == "more root /made/for/it"
    assert await output(sandbox, "sh", "-c", "echo $NEW") == "one"
    await change_defaults(sandbox, {}, None, "/")
