"""What a guest reaches, compared with what its host reaches: one small program, run in both."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import RatoonError
from ratoon.machine.guest.mirrors import named_indexes
from ratoon.machine.host.checks import Check

#: What a distribution's index has at least. It takes packets of full size to come; those are the
#: ones that get lost where an MTU is wrong.
ENOUGH = 64 * 1024
#: So many servers are asked at most, until this host reaches one.
AT_MOST = 3
#: Seconds for the whole of it: two tries to resolve a name, and three network timeouts.
TIMEOUT = 60

#: Arguments: a server, its port, a file, and the address to use where the name is not resolved.
PROBE = """
import json, socket, sys
server, port, path, address = sys.argv[1:5]
found = {}
try:
    found["address"] = address = socket.gethostbyname(server)
except OSError as error:
    found["unresolved"] = str(error)
try:
    with socket.create_connection((address, int(port)), 10) as link:
        found["connected"] = True
        request = ("GET " + path + " HTTP/1.1", "Host: " + server, "Connection: close", "", "")
        link.sendall("\\r\\n".join(request).encode())
        while data := link.recv(65536):
            found["received"] = found.get("received", 0) + len(data)
except OSError as error:
    found["broken"] = str(error)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Server:
    """Whom to ask, by HTTP, and for what."""

    name: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> Server:
        parts = urlsplit(url)
        return cls(parts.hostname or "", parts.port or 80, parts.path)


def known_servers() -> list[Server]:
    """Those that the configuration or this host takes packages from; nobody else is asked."""
    urls = [url for url in named_indexes() if url.startswith("http:")]
    return [Server.of(url) for url in urls][:AT_MOST]


class Reach(BaseModel):
    """What the probe has found; the errors are in the system's words. `received` is in bytes."""

    address: str = ""
    unresolved: str = ""
    connected: bool = False
    received: int = 0
    broken: str = ""

    @property
    def whole(self) -> bool:
        return self.received >= ENOUGH

    @property
    def trouble(self) -> str:
        return self.unresolved or self.broken or f"{self.received} bytes came back"


async def reach_of_host(servers: Sequence[Server]) -> tuple[Server, Reach]:
    """What this host reaches by itself: the first server that it does, or how it fares with one."""
    found = []
    for server in servers:
        words = [sys.executable, "-c", PROBE, server.name, str(server.port), server.path, ""]
        done = await asyncio.to_thread(subprocess.run, words, capture_output=True, check=False)
        found.append((server, _parse(done.stdout, done.stderr)))
        if found[-1][1].whole:
            return found[-1]
    return found[0]


async def reach_of(sandbox: Sandbox, server: Server, address: str) -> Reach:
    """What a guest with a python3 reaches. `address`: the server's, as the host knows it."""
    argv = ["python3", "-c", PROBE, server.name, str(server.port), server.path, address]
    try:
        done = await sandbox.exec(argv, timeout=TIMEOUT)
    except RatoonError as error:
        return Reach(broken=str(error))
    return _parse(done.stdout, done.stderr or b"it took too long")


async def check_outbound(sandbox: Sandbox, servers: Sequence[Server]) -> Check:
    """`servers`: those that may be asked."""
    if not servers:
        return Check(
            "outbound",
            "warn",
            "not tried: neither RATOON_MIRROR nor this host's apt names a server to ask by HTTP",
            "set RATOON_MIRROR to a mirror of Debian's that this host reaches",
        )
    server, host = await reach_of_host(servers)
    return judge(server.name, host, await reach_of(sandbox, server, host.address))


def judge(server: str, host: Reach, guest: Reach) -> Check:
    """A guest is to reach what its host reaches. What the host does not is no fault of ours."""
    if guest.whole and guest.address:
        size = f"{guest.received // 1024} KiB came"
        return Check("outbound", "ok", f"a guest reaches {server}: {size}")
    if not host.whole:
        return Check(
            "outbound",
            "warn",
            f"the host itself does not reach {server} ({host.trouble})",
            "nothing, if it is not meant to: a guest reaches no more than its host",
        )
    if guest.whole:
        return Check(
            "outbound",
            "warn",
            f"a guest reaches the world, but resolves no names ({guest.unresolved})",
            "let the nameserver of /etc/resolv.conf answer this host's other networks too",
        )
    if guest.connected:
        return Check(
            "outbound",
            "warn",
            f"a guest's connections stall: {guest.received} bytes came ({guest.trouble})",
            "large packets are lost on the way: compare the MTUs of this host's interfaces",
        )
    return Check(
        "outbound",
        "warn",
        f"a guest does not reach {server}, though its host does ({guest.trouble})",
        "see what the host's firewall does with packets that it forwards (`nft list ruleset`)",
    )


def _parse(answer: bytes, complaint: bytes) -> Reach:
    try:
        return Reach.model_validate_json(answer)
    except ValidationError:
        return Reach(broken=complaint.decode(errors="replace").strip()[-200:])
