"""An OCI image's configuration, read with care: whoever made the image wrote it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ratoon.engine.sources import blobs
from ratoon.errors import InvalidInput
from ratoon.store.snapshot.image_config import ImageConfig


class _Runtime(BaseModel):
    """`config` of https://github.com/opencontainers/image-spec/blob/main/config.md"""

    model_config = ConfigDict(strict=True)

    env: list[str] | None = Field(None, alias="Env")
    user: str | None = Field(None, alias="User")
    workdir: str | None = Field(None, alias="WorkingDir")
    entrypoint: list[str] | None = Field(None, alias="Entrypoint")
    command: list[str] | None = Field(None, alias="Cmd")
    ports: dict[str, Any] | None = Field(None, alias="ExposedPorts")
    stop_signal: str | None = Field(None, alias="StopSignal")


class _Document(BaseModel):
    model_config = ConfigDict(strict=True)

    architecture: str = ""
    os: str = ""
    config: _Runtime | None = None


def read_config(name: str, manifest: str) -> ImageConfig:
    """The configuration of the image `name`, whose manifest is in the cache.

    InvalidInput: it is for another machine, or makes no sense. Corrupt.
    """
    descriptor = blobs.read_document(manifest).get("config")
    digest = descriptor.get("digest") if isinstance(descriptor, dict) else None
    raw = blobs.read_document(digest)
    try:
        document = _Document.model_validate(raw)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise InvalidInput(f"image {name}: its configuration is wrong at {where}") from None
    platform = document.os or "linux", document.architecture or "amd64"
    if platform != ("linux", "amd64"):
        raise InvalidInput(f"image {name} is for {'/'.join(platform)}; guests are linux/amd64")
    return _image_config(name, document.config)


def _image_config(name: str, runtime: _Runtime | None) -> ImageConfig:
    if runtime is None:
        return ImageConfig()
    env = dict(each.split("=", 1) for each in runtime.env or () if "=" in each)
    words = [*env, *env.values(), *(runtime.entrypoint or ()), *(runtime.command or ())]
    if any("\0" in word for word in (*words, runtime.user or "", runtime.workdir or "")):
        raise InvalidInput(f"image {name}: its configuration has a NUL where none can be")
    return ImageConfig(
        env={key: value for key, value in env.items() if key},
        user=runtime.user or None,
        workdir=runtime.workdir or None,
        entrypoint=tuple(runtime.entrypoint or ()),
        command=tuple(runtime.command or ()),
        exposed_ports=_ports(runtime.ports or {}),
        stop_signal=runtime.stop_signal or None,
    )


def _ports(exposed: dict[str, Any]) -> tuple[int, ...]:
    """The TCP ports of `PORT[-PORT][/PROTOCOL]`; ranges by their first."""
    found = set()
    for text in exposed:
        port, _, protocol = text.partition("/")
        number = port.partition("-")[0]
        if protocol in ("", "tcp") and number.isascii() and number.isdigit():
            found.add(int(number))
    return tuple(sorted(port for port in found if 0 < port < 1 << 16))
