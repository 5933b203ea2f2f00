"""A mirror of Debian's on the loopback, with packages made by hand, that fails as it is told."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from oci_images import Entry
from ratoon.compression import zstd
from ratoon.machine.guest.packages import Lock, Package

#: Cut off: half of it comes. Altered: as long as it should be, but for one byte the same. Stuck:
#: half comes, and then nothing until the client has gone.
Failure = Literal["cut off", "altered", "busy", "missing", "stuck"]
STATUS = {"busy": 503, "missing": 404}


def deb(entries: Sequence[Entry], packing: str = "xz") -> bytes:
    """A package with these files (deb(5))."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    packers: dict[str, Callable[[bytes], bytes]]
    packers = {"xz": lzma.compress, "zst": zstd.compress, "gz": gzip.compress}
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{packing}": b""}
    members[f"data.tar.{packing}"] = packers[packing](tar.getvalue())
    content = b"!<arch>\n"
    for name, data in members.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        content += data + b"\n" * (len(data) % 2)
    return content


@dataclass
class Mirror:
    """`address` is what RATOON_MIRROR has; `asked`: paths, in the order in which they came."""

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    #: By path, how the next requests for it fail; what comes after them does not.
    failures: dict[str, list[Failure]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    #: Set once somebody waits for the other half.
    stuck: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, entries: Sequence[Entry]) -> Package:
        """A package that this mirror has."""
        content = deb(entries)
        path = f"pool/main/{name}/{name}_1_amd64.deb"
        self.files[path] = content
        digest = hashlib.sha256(content).hexdigest()
        return Package(
            name=name, version="1", archive="debian", path=path, size=len(content), sha256=digest
        )


def lock_of(*packages: Package) -> Lock:
    return Lock(date="20200101T000000Z", packages=[*packages])


@contextmanager
def mirror() -> Iterator[Mirror]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.removeprefix("/debian/")
            found.asked.append(path)
            failures = found.failures.get(path)
            failure = failures.pop(0) if failures else None
            content = found.files.get(path)
            if content is None or failure in STATUS:
                self.send_error(STATUS.get(failure or "", 404))
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if failure in ("cut off", "stuck"):
                content = content[: len(content) // 2]
            elif failure == "altered":
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.wfile.write(content)
            if failure == "stuck":
                found.stuck.set()
                self.connection.recv(1)

        def log_message(self, *_: object) -> None:
            """Not to the tests' output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Mirror(f"http://127.0.0.1:{server.server_port}/debian")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
