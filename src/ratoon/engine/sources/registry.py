"""Names of images in registries, as Docker has them: `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address

from ratoon.errors import InvalidInput

HUB = "docker.io"

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(
    rf"(?P<path>{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?")


@dataclass(frozen=True)
class RegistryName:
    """`version` is `:TAG`, or `@DIGEST`, which says it exactly."""

    host: str
    path: str
    version: str

    @classmethod
    def parse(cls, text: str) -> RegistryName:
        """InvalidInput: no image can be called that."""
        host, slash, rest = text.partition("/")
        if not slash or not (host == "localhost" or "." in host or ":" in host):
            host, rest = HUB, text
        match = _NAME.fullmatch(rest)
        if match is None or not _HOST.fullmatch(host) or len(text) > 512:
            raise InvalidInput(
                f"{text!r} cannot be the name of an image; such as python:3.12-slim, "
                "registry.example:5000/web, debian:trixie+git, oci:DIRECTORY, dir:DIRECTORY "
                "are: see docs/images.md"
            )
        path = match["path"]
        if host == HUB and "/" not in path:
            path = f"library/{path}"
        version = f"@{match['digest']}" if match["digest"] else f":{match['tag'] or 'latest'}"
        return cls(host, path, version)

    def __str__(self) -> str:
        return f"{self.host}/{self.path}{self.version}"

    @property
    def is_here(self) -> bool:
        """Whether the registry is on this host's loopback."""
        name = self.host.partition(":")[0]
        try:
            return name == "localhost" or ip_address(name).is_loopback
        except ValueError:
            return False
