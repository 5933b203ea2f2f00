"""Programs with random generators of their own, in forks: what is equal, and what mends it."""

from __future__ import annotations

from pathlib import Path

import pytest
from vm_helpers import forget, fork_of_image

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.guest import commands

RECIPES = Path(__file__).parents[2] / "examples/rebirth.d"
HOOKS = "/etc/ratoon/rebirth.d"
#: Seconds for a compiler, or a Java machine, under emulation.
LONG = 900

#: Draws once, says that it is ready, and what it draws next when there is a line of input.
PYTHON = """
import os, random, signal, ssl, sys, uuid
def anew(*_):
    ssl.RAND_add(os.urandom(32), 32)
    random.seed()
if "mended" in sys.argv:
    signal.signal(signal.SIGUSR2, anew)
    os.makedirs("/run/reborn.d", exist_ok=True)
    with open("/run/reborn.d/python", "w") as file: file.write(str(os.getpid()))
def draw(): return [ssl.RAND_bytes(16).hex(), random.random(), uuid.uuid4().hex]
draw(); print("ready", flush=True); input()
for each in draw(): print(each)
"""
#: A worker draws; at a SIGUSR2 there is another one.
NODE = """
const cluster = require("cluster"), crypto = require("crypto"), fs = require("fs");
const draw = () => [crypto.randomBytes(16).toString("hex"), Math.random(), crypto.randomUUID()];
if (cluster.isPrimary) {
    cluster.fork().once("message", () => console.log("ready"));
    let worker = Object.values(cluster.workers)[0];
    if (process.argv.includes("mended")) {
        process.on("SIGUSR2", () => { worker.kill(); worker = cluster.fork(); });
        fs.mkdirSync("/run/reborn.d", { recursive: true });
        fs.writeFileSync("/run/reborn.d/node", String(process.pid));
    }
    process.stdin.once("data", () => {
        worker.on("message", (drawn) => {
            if (drawn.length) { drawn.forEach((each) => console.log(each)); process.exit(); } });
        worker.send("draw"); });
} else {
    draw(); process.send([]);
    process.on("message", () => process.send(draw()));
}
"""
GO = """
package main
import ("bufio"; crypto "crypto/rand"; "fmt"; "math/rand"; "os"; "time")
func draw() {
    drawn := make([]byte, 16); crypto.Read(drawn)
    fmt.Printf("%x\\n%d\\n", drawn, rand.Int63())
}
func main() {
    rand.Seed(time.Now().UnixNano())
    crypto.Read(make([]byte, 16)); rand.Int63()
    fmt.Println("ready"); bufio.NewReader(os.Stdin).ReadString('\\n')
    draw()
}
"""
JAVA = """
import java.security.SecureRandom;
public class Draw {
    public static void main(String[] arguments) throws Exception {
        SecureRandom secure = new SecureRandom();
        secure.nextLong(); Math.random(); java.util.UUID.randomUUID();
        System.out.println("ready"); System.in.read();
        System.out.println(secure.nextLong());
        System.out.println(Math.random());
        System.out.println(java.util.UUID.randomUUID());
    }
}
"""


async def put(sandbox: Sandbox, recipe: str) -> None:
    path = f"{HOOKS}/{recipe}"
    await sandbox.files.write(path, (RECIPES / recipe).read_bytes(), mode=0o755, parents=True)


async def sh(sandbox: Sandbox, script: str) -> str:
    result = await sandbox.exec(["sh", "-ec", script], timeout=LONG)
    assert result.exit_code == 0, result
    return result.stdout.decode()


async def equal_in_forks(engine: Engine, sandbox: Sandbox, argv: list[str]) -> list[bool]:
    """Of each line that a program draws after a snapshot, whether two forks have the same."""
    drawn = []
    async with commands.start(sandbox, argv, stdin=True, background=True) as program:
        pid, said = program.pid, b""
        while b"ready\n" not in said:
            piece = await program.read()
            assert piece is not None, await program.wait()
            said += piece[1]
    assert pid is not None
    tag = "drawing"
    await engine.branch(sandbox, tag)
    for _ in range(2):
        async with await engine.fork_one(tag) as fork, commands.attach(fork, pid) as program:
            await program.write(b"\n")
            said = b""
            while (piece := await program.read()) is not None:
                said += piece[1]
            assert (await program.wait()).exit_code == 0, said
            drawn.append(said.decode().partition("ready\n")[2].split())
    await engine.settle()
    forget(engine, tag)
    assert len(drawn[0]) == len(drawn[1]) > 1
    return [one == other for one, other in zip(*drawn, strict=True)]


async def test_openssl_and_python(engine: Engine) -> None:
    """OpenSSL's generator is told of a new seed; `uuid4` asks the kernel."""
    argv = ["python3", "-c", PYTHON]
    async with await engine.fork_one("base") as sandbox:
        assert await equal_in_forks(engine, sandbox, argv) == [True, True, False]
        await put(sandbox, "10-programs")
        assert await equal_in_forks(engine, sandbox, [*argv, "mended"]) == [False] * 3


# Those of the long runs ---------------------------------------------------------------------------


@pytest.mark.soak
async def test_node(engine: Engine) -> None:
    """Its OpenSSL cannot be told anything; another worker is another process."""
    async with fork_of_image(engine, "debian+nodejs", disk=2048) as sandbox:
        argv = ["node", "-e", NODE]
        assert await equal_in_forks(engine, sandbox, argv) == [True, True, True]
        await put(sandbox, "10-programs")
        assert await equal_in_forks(engine, sandbox, [*argv, "mended"]) == [False] * 3


IMAGE = "debian+nginx-light+redis-server+procps"
NGINX_WORKERS = "ps -o pid= --ppid $(cat /run/nginx.pid) | sort"
REDIS = "redis-server --dir /srv --enable-debug-command local --daemonize yes >/dev/null"
REDIS_IS_UP = "until redis-cli get kept 2>/dev/null | grep -q this; do sleep 0.2; done"
RUN_ID = "redis-cli info server | grep ^run_id"


@pytest.mark.soak
async def test_nginx_and_redis(engine: Engine) -> None:
    async with fork_of_image(engine, IMAGE, disk=2048) as sandbox:
        await sh(sandbox, f"nginx; {REDIS}; until redis-cli set kept this; do sleep 0.2; done")
        ids = {await sh(sandbox, RUN_ID)}
        workers = await sh(sandbox, NGINX_WORKERS)
        for recipe in ("20-nginx", "30-redis"):
            await put(sandbox, recipe)
        await engine.branch(sandbox, "serving")
        for _ in range(2):
            async with await engine.fork_one("serving") as fork:
                wait = f"until [ \"$({NGINX_WORKERS})\" != '{workers}' ]; do sleep 0.2; done"
                await sh(fork, wait)
                before = (await sh(sandbox, RUN_ID)).strip()
                await sh(fork, f"while {RUN_ID} | grep -q '{before}'; do sleep 0.2; done")
                await sh(fork, REDIS_IS_UP)
                ids.add(await sh(fork, RUN_ID))
    assert len(ids) == 3


@pytest.mark.soak
async def test_go(engine: Engine) -> None:
    """What is for secrets asks the kernel; what is not, does not, and nothing tells it to."""
    async with fork_of_image(engine, "debian+golang-go", ram=1024, disk=2048) as sandbox:
        await sandbox.files.write("/srv/draw.go", GO.encode())
        await sh(sandbox, "cd /srv; HOME=/srv go build draw.go")
        assert await equal_in_forks(engine, sandbox, ["/srv/draw"]) == [False, True]


@pytest.mark.soak
async def test_java(engine: Engine) -> None:
    image = "debian+openjdk-17-jdk-headless"
    async with fork_of_image(engine, image, ram=1024, disk=2048) as sandbox:
        await sandbox.files.write("/srv/Draw.java", JAVA.encode())
        await sh(sandbox, "cd /srv; javac Draw.java")
        argv = ["java", "-cp", "/srv", "Draw"]
        assert await equal_in_forks(engine, sandbox, argv) == [False, True, False]
