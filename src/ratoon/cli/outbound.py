"""What a guest reaches, compared with what its host reaches: one small program, run in both."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from pydantic import BaseModel, ValidationError

from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import RatoonError
from ratoon.machine.host.checks import Check

#: A file of some 150 KiB, on the server that the guest is built from. It takes packets of full size
#: to come; those are the ones that get lost where an MTU is wrong.
SERVER = "deb.debian.org"
FILE = "/debian/dists/bookworm/InRelease"
ENOUGH = 64 * 1024
#: Seconds for the whole of it: two tries to resolve a name, and three network timeouts.
TIMEOUT = 60

#: Arguments: a server, a file, and the address to use where the name is not resolved.
PROBE = """
import json, socket, sys
server, path, address = sys.argv[1:4]
found = {}
try:
    found["address"] = address = socket.gethostbyname(server)
except OSError as error:
    found["unresolved"] = str(error)
try:
    with socket.create_connection((address, 80), 10) as link:
        found["connected"] = True
        request = ("GET " + path + " HTTP/1.1", "Host: " + server, "Connection: close", "", "")
        link.sendall("\\r\\n".join(request).encode())
        while data := link.recv(65536):
            found["received"] = found.get("received", 0) + len(data)
except OSError as error:
    found["broken"] = str(error)
print(json.dumps(found))
"""


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


async def reach_of_host() -> Reach:
    """What this host reaches by itself."""
    words = [sys.executable, "-c", PROBE, SERVER, FILE, ""]
    done = await asyncio.to_thread(subprocess.run, words, capture_output=True, check=False)
    return _parse(done.stdout, done.stderr)


async def reach_of(sandbox: Sandbox, address: str) -> Reach:
    """What a guest with a python3 reaches. `address`: the server's, as the host knows it."""
    argv = ["python3", "-c", PROBE, SERVER, FILE, address]
    try:
        done = await sandbox.exec(argv, timeout=TIMEOUT)
    except RatoonError as error:
        return Reach(broken=str(error))
    return _parse(done.stdout, done.stderr or b"it took too long")


def judge(host: Reach, guest: Reach) -> Check:
    """A guest is to reach what its host reaches. What the host does not is no fault of ours."""
    if guest.whole and guest.address:
        size = f"{guest.received // 1024} KiB came"
        return Check("outbound", "ok", f"a guest reaches {SERVER}: {size}")
    if not host.whole:
        return Check(
            "outbound",
            "warn",
            f"the host itself does not reach {SERVER} ({host.trouble})",
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
        f"a guest does not reach {SERVER}, though its host does ({guest.trouble})",
        "see what the host's firewall does with packets that it forwards (`nft list ruleset`)",
    )


def _parse(answer: bytes, complaint: bytes) -> Reach:
    try:
        return Reach.model_validate_json(answer)
    except ValidationError:
        return Reach(broken=complaint.decode(errors="replace").strip()[-200:])
