"""What a command wrote, gathered while it comes, and how it ended."""

from __future__ import annotations

import codecs
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ratoon.api.answers import EvalResult, read
from ratoon.errors import CommandFailed

#: Bytes of stdout, and of stderr, that a result has at most.
LIMIT = 64 * 1024 * 1024
#: Characters of stderr in an error's message.
_TAIL = 2000


@dataclass(frozen=True)
class Output:
    """What a command wrote: to stdout, or to a terminal, or to stderr."""

    stream: Literal["stdout", "stderr"]
    data: bytes


@dataclass(frozen=True)
class CommandResult:
    """How a command ended.

    `exit_code` is a shell's: 124 timed out, 126 not executable, 127 not found, 128 + n killed by
    signal n. `reason` says so in words where it is not the command's own. `truncated`: it wrote
    more than is kept.
    """

    exit_code: int
    stdout_bytes: bytes = field(default=b"", repr=False)
    stderr_bytes: bytes = field(default=b"", repr=False)
    timed_out: bool = False
    reason: str | None = None
    truncated: bool = False

    @property
    def stdout(self) -> str:
        """As text; bytes that are not UTF-8 are replaced."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self.stderr_bytes.decode(errors="replace")


def command_of(command: str | Sequence[str]) -> tuple[list[str], str]:
    """The program and its arguments, and how errors show them. Text is for a shell."""
    if isinstance(command, str):
        return ["sh", "-c", command], command
    return [*command], shlex.join(command)


def output_of(message: bytes) -> Output:
    """A message of a command's stream: a byte that says which of its outputs, and that."""
    return Output("stderr" if message[:1] == b"\x02" else "stdout", message[1:])


class OutputCollector:
    """Keeps what comes, up to a limit, and decodes it for those who listen."""

    def __init__(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")
        self._kept = {"stdout": bytearray(), "stderr": bytearray()}
        self._decoders = {name: decoder("replace") for name in self._kept}
        self._truncated = False

    def add(self, output: Output) -> str:
        """The text that is complete with it."""
        kept = self._kept[output.stream]
        room = LIMIT - len(kept)
        kept += output.data[:room]
        self._truncated |= len(output.data) > room
        return self._decoders[output.stream].decode(output.data)

    def rest(self, stream: str) -> str:
        """What stands for bytes at the very end that were no whole character."""
        return self._decoders[stream].decode(b"", final=True)

    def result(self, ended: dict[str, Any]) -> CommandResult:
        return CommandResult(
            exit_code=ended["exit_code"],
            stdout_bytes=bytes(self._kept["stdout"]),
            stderr_bytes=bytes(self._kept["stderr"]),
            timed_out=ended["timed_out"],
            reason=ended["reason"],
            truncated=self._truncated,
        )

    def evaluated(self, ended: dict[str, Any]) -> EvalResult:
        """The same of code."""
        texts = {name: kept.decode(errors="replace") for name, kept in self._kept.items()}
        truncated = self._truncated or ended["truncated"]
        return read(EvalResult, {**ended, **texts, "truncated": truncated})


def require_success(result: CommandResult, shown: str) -> CommandResult:
    """The result of the command that is `shown` so; CommandFailed if its exit code is not 0."""
    if result.exit_code == 0:
        return result
    how = "took too long, and was killed" if result.timed_out else f"ended with {result.exit_code}"
    reason = result.reason or result.stderr.strip()[-_TAIL:]
    raise CommandFailed(
        f"{shown}: {how}" + (f": {reason}" if reason else ""),
        status=result.exit_code,
        stdout=result.stdout,
        stderr=result.stderr,
    )
