"""What a sandbox may use of its host."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, model_validator

from ratoon.documents import Document
from ratoon.units import MIB

#: A started fork has 22 MiB of its own and, after a command or two, 50 to 90; without an image up
#: to 64 MiB of pages are written into it first.
LEAST_MEMORY = 128 * MIB
#: Of one processor. With less, a fork would not answer within the agent's timeouts.
LEAST_CPUS = 0.05
#: QEMU's threads: up to 64 that wait for the disk, one for each virtual CPU, and a few more. It
#: ends itself when it cannot start one.
LEAST_PIDS = 160
#: A device state and logs must fit into a file, too.
LEAST_DISK = 16 * MIB


def _bytes(least: int) -> AfterValidator:
    def check(value: int) -> int:
        if value < least:
            said = f"{value} bytes" if value % MIB else f"{value // MIB} MiB"
            raise ValueError(f"{said} are too few; use {least // MIB} MiB or more")
        return value

    return AfterValidator(check)


def _number(least: float, unit: str) -> AfterValidator:
    def check(value: float) -> float:
        if not least <= value < 1 << 20:
            raise ValueError(f"{value} {unit}: use {least} or more")
        return value

    return AfterValidator(check)


class Limits(Document, strict=False, allow_inf_nan=True):
    """Limits of one sandbox; None: no limit.

    `memory_bytes` counts all that its QEMU process makes the host hold: the guest's memory that it
    has written since the fork, what QEMU itself needs (25 to 90 MiB), and, as the kernel sees fit,
    page cache. What is only read from an image or a disk is page cache, which the kernel takes back
    before it kills. So this may be less than the guest's RAM: a guest that writes more is killed.

    `cpus` is a share of the host's processors: 0.5 is half of one. `pids` counts the threads of
    QEMU, not what runs in the guest. `disk_bytes` is how long the file may get that the guest's
    disk writes go to; each branch begins a new one.
    """

    memory_bytes: Annotated[int, _bytes(LEAST_MEMORY)] | None = None
    cpus: Annotated[float, _number(LEAST_CPUS, "CPUs")] | None = None
    pids: Annotated[int, _number(LEAST_PIDS, "threads")] | None = None
    disk_bytes: Annotated[int, _bytes(LEAST_DISK)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_it_was_written(cls, values: Any) -> Any:
        """Records of an older Ratoon have a limit of output, which could not be set."""
        if isinstance(values, dict) and values.get("output_bytes", 0) is None:
            return {name: value for name, value in values.items() if name != "output_bytes"}
        return values
