"""Debian's `docker-registry` on the loopback, from its package: nothing is installed for it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from small_images import debian

_LISTENING = re.compile(r"listening on 127\.0\.0\.1:(\d+)")
_REQUEST = re.compile(r'"([A-Z]+) (/v2/[^ ]*) HTTP/1.1" (\d+)')
USER, PASSWORD = "jane", "open sesame"
_HTPASSWD = f"{USER}:$2b$04$wD5iUMoLIMjClepoNsymHeQvyPtrk8syZLsVjVI.0JomUjLx6hoZu\n"


def program() -> Path:
    """The registry's executable, in the cache; to be asked for before a test has another cache."""
    return debian("docker-registry") / "usr/bin/docker-registry"


@dataclass(frozen=True)
class Registry:
    """`host` is `127.0.0.1:PORT`; its images lie below `root`."""

    host: str
    root: Path
    log: Path

    def push(self, source: str, name: str, *credentials: str) -> str:
        """Copy what skopeo calls `source` there; what we call it."""
        target = f"docker://{self.host}/{name}"
        options = ["--quiet", "--dest-tls-verify=false", *credentials]
        subprocess.run(["skopeo", "copy", *options, source, target], check=True)
        return f"{self.host}/{name}"

    def requests(self) -> list[tuple[str, str, int]]:
        """All that it was asked for, as it says itself: method, path, status."""
        found = _REQUEST.findall(self.log.read_text())
        return [(method, path, int(status)) for method, path, status in found]

    def sent_blobs(self) -> list[str]:
        """The digests of the blobs that it has sent, each as often as it was."""
        return [
            path.rpartition("/")[2]
            for method, path, status in self.requests()
            if method == "GET" and "/blobs/sha256:" in path and status == 200
        ]

    def blob(self, digest: str) -> Path:
        """The file that it sends for a digest."""
        name = digest.removeprefix("sha256:")
        return self.root / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


@contextmanager
def serving(executable: Path, place: Path, *, private: bool = False) -> Iterator[Registry]:
    """A registry that keeps all in the directory `place`; `private`: for USER with PASSWORD."""
    log, users = place / "log", place / "users"
    users.write_text(_HTPASSWD)
    auth = f"auth: {{htpasswd: {{realm: test, path: {users}}}}}\n" if private else ""
    (place / "config.yml").write_text(
        "version: 0.1\nlog: {level: info, accesslog: {disabled: false}}\n"
        f"storage: {{filesystem: {{rootdirectory: {place}}}}}\n"
        f"http: {{addr: 127.0.0.1:0}}\n{auth}"
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            [executable, "serve", place / "config.yml"],
            stdout=output,
            stderr=output,
            env={},  # it takes REGISTRY_… for its configuration, clients' REGISTRY_AUTH_FILE too
        )
    try:
        deadline = time.monotonic() + 60
        while not (match := _LISTENING.search(log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield Registry(f"127.0.0.1:{match[1]}", place, log)
    finally:
        process.kill()
        process.wait()
