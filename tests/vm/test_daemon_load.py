"""Many requests at once, and clients that are slow or gone."""

from __future__ import annotations

import asyncio
import socket

from served_daemon import Served

pytest_plugins = ["daemon_plugin"]


async def test_many_commands_over_many_sandboxes(forked: Served, soak: bool) -> None:
    sandboxes, commands = (20, 200) if soak else (6, 60)
    ids = await forked.fork(sandboxes)

    async def run(number: int) -> None:
        sandbox = ids[number % sandboxes]
        body = {"args": ["sh", "-c", f"echo {number} $(hostname)"], "timeout_secs": 600}
        answer = await forked.api.post(f"/v1/sandboxes/{sandbox}/exec", json=body, timeout=600)
        done = answer.json()
        assert (done["exit_code"], done["stdout"]) == (0, f"{number} {sandbox}\n"), done

    async with asyncio.TaskGroup() as group:
        for number in range(commands):
            group.create_task(run(number))


async def test_slow_and_dead_clients_hold_up_nobody(served: Served, shared_sandbox: str) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    head = f"POST /v1/sandboxes/{shared_sandbox}/exec HTTP/1.1\r\nHost: {host}\r\n"
    beginnings = [
        b"",
        b"POST /v1/sand",
        head.encode(),
        f"{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{".encode(),
        f"GET /v1/sandboxes/{shared_sandbox}/files?path=/dev/zero HTTP/1.1\r\n".encode(),
    ]
    clients = []
    try:
        for beginning in beginnings * 10:
            clients.append(socket.create_connection((host, int(port))))
            clients[-1].sendall(beginning)
        for _ in range(3):
            answer = await served.api.post(
                f"/v1/sandboxes/{shared_sandbox}/exec", json={"args": ["echo", "here"]}
            )
            assert answer.json()["stdout"] == "here\n"
    finally:
        for client in clients:
            client.close()


async def test_a_download_that_nobody_takes_holds_up_nobody(
    served: Served, shared_sandbox: str
) -> None:
    path = f"/v1/sandboxes/{shared_sandbox}/files?path=/root/large"
    body = {"args": ["sh", "-c", "head -c 20000000 /dev/zero >/root/large"], "timeout_secs": 600}
    await served.api.post(f"/v1/sandboxes/{shared_sandbox}/exec", json=body, timeout=600)
    reader, writer = await asyncio.open_unix_connection(str(served.socket))
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        part = await served.api.get(f"{path}&offset=19999990")
        assert part.content == bytes(10)
    finally:
        writer.close()
