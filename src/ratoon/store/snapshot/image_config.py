"""How an image wants its programs run: a record that a snapshot keeps of what it was built from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from ratoon.documents import Document

Port = Annotated[int, Field(ge=1, le=65535)]


class ImageConfig(Document):
    """How an image wants its programs run: what a container runtime would take from it.

    `user` is `NAME` or `UID`, or either with `:GROUP`, of the image's own. `exposed_ports` are TCP.
    """

    env: dict[str, str] = Field(default={})
    user: str | None = None
    workdir: str | None = None
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    exposed_ports: tuple[Port, ...] = ()
    stop_signal: str | None = None

    def argv(
        self, command: Sequence[str] = (), entrypoint: Sequence[str] | None = None
    ) -> list[str]:
        """What is run: the entrypoint, given `command` or else the image's own.

        An image's command is for its own entrypoint: with another `entrypoint` it is left out.
        """
        if entrypoint is not None:
            return [*entrypoint, *command]
        return [*self.entrypoint, *(command or self.command)]
