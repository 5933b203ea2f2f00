"""What others have written, tested by its own tests, inside a sandbox.

Each is set up once, and a snapshot made; its tests run in a fork of that.
"""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from vm_helpers import base_of

from ratoon.api.answers import CommandEnd
from ratoon.artifacts import build_once
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions, Volume
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.guest import commands

#: Seconds after which something has hung; a whole suite takes minutes on a busy host.
SUITE = 1800.0
#: A sandbox's Python finds there what was installed.
SITE = "/opt/site"
RUNNER = ("pytest==8.3.5",)
#: Projects on PyPI, and their versions.
PYTHON = {"pluggy": "1.5.0", "click": "8.1.8"}
PYTHON_TESTS = f"""
set -o pipefail; cd /opt/source; export PYTHONPATH={SITE} PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
python3 -m pytest -q -p no:cacheprovider 2>&1 | tail -n 20
"""
#: A project on npm, with its tests in what is published, and what they take to run.
NODE = ("minimist@1.2.8", "tape@5.9.0")
NODE_TESTS = "cd /opt/node_modules/minimist; node ../.bin/tape 'test/*.js' | tail -n 8"

SERVERS = "debian:bookworm+nodejs+postgresql+redis-server"
POSTGRES = """
as() { setpriv --reuid postgres --regid postgres --init-groups "$@"; }
export PATH=$PATH:/usr/lib/postgresql/15/bin PGHOST=/tmp PGUSER=postgres PGDATA=$place/data
"""
MAKE_CLUSTER = """
install -d -o postgres $place; cd $place
as initdb -D $PGDATA --no-locale -E UTF8 >/dev/null
"""
START = (
    "cd /; exec setpriv --reuid postgres --regid postgres --init-groups postgres -D $PGDATA -k /tmp"
)
UNTIL_UP = "until pg_isready -q; do sleep 0.1; done"
#: Its own load, at once and by many, and its own checks of all that is in it.
CHECKS = """
pgbench -i -q postgres 2>/dev/null
pgbench -c 4 -t 25 postgres 2>/dev/null | grep processed
pg_amcheck --all --install-missing --heapallindexed && echo sound
psql -qAtc 'select count(*) from pgbench_history'
"""
CHECKED = ["number of transactions actually processed: 100/100", "sound", "100"]
REDIS = """
cd $place
redis-server --dir $place --appendonly yes --appendfsync always --daemonize yes >/dev/null
until redis-cli ping >/dev/null 2>&1; do sleep 0.1; done
"""
REDIS_LOAD = """
redis-benchmark -q -n 500 -c 10 -r 100 -t set,incr,lpush,hset,spop,zadd,mset >/dev/null
redis-cli dbsize; redis-cli shutdown
"""


async def run(sandbox: Sandbox, script: str, *, user: str | None = None) -> str:
    """What `script` prints; it must succeed."""
    result = await sandbox.exec(["bash", "-ec", script], user=user, timeout=SUITE)
    said = (result.stdout + result.stderr).decode(errors="replace")
    assert result.exit_code == 0, said[-4000:]
    return said


async def give(sandbox: Sandbox, trees: dict[Path, str]) -> None:
    """Put directories of this host below /opt, by these names."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for tree, name in trees.items():
            archive.add(tree, name)
    await sandbox.files.write("/opt/given.tar", packed.getvalue())
    await run(sandbox, "cd /opt; tar -x --no-same-owner -f given.tar; rm given.tar")


def downloaded(project: str) -> Path:
    """A project as PyPI has it: `site`, with what its tests need, and `source`, with its tests."""
    exact = f"{project}=={PYTHON[project]}"

    def build(room: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--quiet"]
        to_site = ["install", "--target", str(room / "site"), "--only-binary=:all:"]
        subprocess.run([*pip, *to_site, exact, *RUNNER], check=True)
        to_source = ["download", "--no-deps", "--no-binary=:all:", "--dest", str(room)]
        subprocess.run([*pip, *to_source, exact], check=True)
        (packed,) = room.glob("*.tar.gz")
        with tarfile.open(packed) as archive:
            archive.extractall(room, filter="data")
        packed.unlink()
        (unpacked,) = room.glob(f"{project}-*")
        unpacked.rename(room / "source")

    return build_once("wheels", {"project": exact, "with": RUNNER}, build)


@asynccontextmanager
async def prepared(engine: Engine, project: str) -> AsyncIterator[Sandbox]:
    """A fork of a snapshot that has the project."""
    place = downloaded(project)
    async with await engine.fork_one("base") as sandbox:
        await give(sandbox, {place / "site": "site", place / "source": "source"})
        await engine.branch(sandbox, project)
    async with await engine.fork_one(project) as sandbox:
        yield sandbox


@pytest.mark.parametrize("project", ["pluggy", pytest.param("click", marks=pytest.mark.soak)])
async def test_a_python_project(engine: Engine, project: str) -> None:
    """By a user who is not root: some of its tests try what others may not."""
    async with prepared(engine, project) as sandbox:
        said = await run(sandbox, PYTHON_TESTS, user="nobody")
        assert " passed" in said, said


@pytest.fixture(scope="module")
async def servers(engine: Engine) -> AsyncIterator[str]:
    """A base that has PostgreSQL, Redis and Node, as Debian has them."""
    async with base_of(engine, SERVERS, disk=8192) as tag:
        yield tag


@pytest.mark.soak
async def test_a_node_project(engine: Engine, servers: str, tmp_path: Path) -> None:
    """It takes an `npm` on this host."""
    npm = ["npm", "install", "--silent", "--ignore-scripts", "--prefix", str(tmp_path), *NODE]
    await asyncio.to_thread(subprocess.run, npm, check=True)
    async with await engine.fork_one(servers) as sandbox:
        await give(sandbox, {tmp_path / "node_modules": "node_modules"})
        await engine.branch(sandbox, "node")
    async with await engine.fork_one("node") as sandbox:
        said = await run(sandbox, NODE_TESTS, user="nobody")
        assert "\n# fail" not in said, said
        assert "\n# ok" in said, said


async def begin(sandbox: Sandbox, script: str) -> None:
    """Have it as the command that the sandbox was made for."""
    argv = ["bash", "-c", script]
    async with commands.start(sandbox, argv, background=True, main=True):
        pass


@pytest.mark.soak
@pytest.mark.parametrize("place", ["/srv/disk", "/srv/volume"])
async def test_postgresql(engine: Engine, servers: str, place: str) -> None:
    """By its own checks; on a volume, it is then stopped in peace, and need not recover."""
    options = SandboxOptions(
        volumes=(Volume(source="pg", target="/srv/volume"),), stop_signal="SIGINT"
    )
    here = f"place={place}/pg; {POSTGRES}"
    async with await engine.fork_one(servers, options) as sandbox:
        await run(sandbox, here + MAKE_CLUSTER)
        await begin(sandbox, here + START)
        said = await run(sandbox, here + UNTIL_UP + CHECKS)
        assert [line for line in said.splitlines() if line] == CHECKED
        ended = await sandbox.stop(SUITE)
        assert ended == CommandEnd(0)
    if place == "/srv/disk":
        return
    async with await engine.fork_one(servers, options) as sandbox:
        await begin(sandbox, f"{here} ({START}) 2>/tmp/log")
        count = await run(sandbox, f"{here} {UNTIL_UP}; psql -qAtc 'table pgbench_history' | wc -l")
        assert count == "100\n"
        log = await run(sandbox, "cat /tmp/log")
        assert "database system was shut down at" in log
        assert "recovery" not in log


@pytest.mark.soak
@pytest.mark.parametrize("place", ["/srv/disk", "/srv/volume"])
async def test_redis(engine: Engine, servers: str, place: str) -> None:
    options = SandboxOptions(volumes=(Volume(source="redis", target="/srv/volume"),))
    here = f"mkdir -p {place}; place={place}; "
    async with await engine.fork_one(servers, options) as sandbox:
        kept = await run(sandbox, here + REDIS + REDIS_LOAD)
        assert int(kept) > 100
        again = await run(sandbox, here + REDIS + "redis-cli dbsize; redis-cli shutdown")
        assert again == kept
