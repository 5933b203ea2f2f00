"""What a sandbox is started with, besides its snapshot."""

from __future__ import annotations

import os
import signal
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from ratoon.api.answers import IdleCounts
from ratoon.documents import Document
from ratoon.machine.host.limits import Limits
from ratoon.machine.network.policy import NetworkPolicy
from ratoon.machine.volumes.named import check_name

#: Of one sandbox.
MAX_VOLUMES = 32
#: What asks a command to end, where nobody says otherwise.
STOP_SIGNAL = "SIGTERM"
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Volume(Document, strict=False):
    """A directory that is mounted in the guest: see `sandbox.mounts`.

    `source`: the real, absolute path of a directory of the host, or the name of a named volume.
    """

    source: str
    #: An absolute path in the guest; it is made where there is none.
    target: str
    read_only: bool = False

    @field_validator("source")
    @classmethod
    def _is_source(cls, source: str) -> str:
        if source == "/":
            raise ValueError("the root of the host can be no volume")
        if source.startswith("/"):
            return _canonical(source)
        check_name(source)
        return source

    @field_validator("target")
    @classmethod
    def _is_target(cls, target: str) -> str:
        if _canonical(target) in ("/", "/dev") or f"{target}/".startswith(("/proc/", "/sys/")):
            raise ValueError(
                f"a volume cannot be at {target}: the guest works by what is there; "
                "/mnt/NAME is a place for one"
            )
        return target

    @property
    def named(self) -> bool:
        return not self.source.startswith("/")


def signal_number(name: str) -> int:
    """Of `SIGTERM`, `TERM`, `SIGRTMIN+3` or `15`; ValueError."""
    word, plus, more = name.upper().removeprefix("SIG").partition("+")
    known = signal.Signals.__members__.get(f"SIG{word}")
    number = int(word) if word.isdecimal() else int(known or 0)
    if plus:
        number = number + int(more) if word == "RTMIN" and more.isdecimal() else 0
    if number not in signal.valid_signals():
        raise ValueError(f"there is no signal {name}")
    return number


def _canonical(path: str) -> str:
    path.encode()  # a UnicodeEncodeError is a ValueError
    odd = path.startswith("//") or "\0" in path or os.path.normpath(path) != path
    if odd or not path.startswith("/"):
        raise ValueError(f"{path!r} is no absolute path without . and .. in it")
    return path


class SandboxOptions(Document, strict=False):
    """Chosen at the fork, and kept through standby and reset."""

    #: What its guest may reach; None: what its snapshot says.
    network: NetworkPolicy | None = None
    #: What it may use of its host.
    limits: Limits = Limits()
    #: It is killed this long after its fork; None: never.
    ttl_seconds: Seconds | None = None
    #: It goes to standby when it has not been used for so long, and wakes when it is; None: never.
    idle_seconds: Seconds | None = None
    #: What counts as use: see `Sandbox.look`.
    idle_counts: IdleCounts = "activity"
    #: A machine is kept started for its next reset, which is sooner then.
    spare: bool = False
    #: It is killed once its main command has ended.
    auto_remove: bool = False
    #: What asks its main command to end; None: what its image says.
    stop_signal: str | None = None
    #: What its commands have, where they do not say otherwise: besides the snapshot's environment,
    #: and for its user and directory.
    env: dict[str, str] = Field(default={})
    user: str | None = None
    workdir: str | None = None
    #: What is mounted in its guest.
    volumes: tuple[Volume, ...] = ()
    #: What its user wants to find it by.
    metadata: dict[str, str] = Field(default={})

    @field_validator("stop_signal")
    @classmethod
    def _is_signal(cls, name: str | None) -> str | None:
        if name is not None:
            signal_number(name)
        return name

    @model_validator(mode="after")
    def _volumes_fit_together(self) -> Self:
        targets = [volume.target for volume in self.volumes]
        if len(set(targets)) < len(targets):
            raise ValueError("two volumes have the same target")
        if len(targets) > MAX_VOLUMES:
            raise ValueError(f"{len(targets)} volumes are more than {MAX_VOLUMES}")
        return self
