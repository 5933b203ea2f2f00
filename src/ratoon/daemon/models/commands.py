"""Programs and code in a sandbox."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Self

from pydantic import Field, model_validator

from ratoon.api.answers import EvalResult
from ratoon.daemon.models.common import Request, Timeout, Word


class ExecRequest(Request):
    """`args` is the program and its arguments; no shell takes part.

    `user`: NAME or UID, also with `:GROUP`.
    """

    args: Annotated[list[Word], Field(min_length=1)]
    timeout_secs: Timeout = 30
    env: dict[Word, Word] | None = None
    cwd: Word | None = None
    user: Word | None = None
    stdin: str = ""


class TerminalSize(Request):
    rows: Annotated[int, Field(ge=1, le=65535)]
    columns: Annotated[int, Field(ge=1, le=65535)]


class ExecOpening(Request):
    """What is said first on `exec/stream`: a program to start, or a pid to attach to.

    `user`: NAME or UID, also with `:GROUP`. A program in the `background` goes on when the client
    leaves. Without a `timeout`, in seconds, it may take for ever. `main`: the sandbox is made for
    it, and its end is told. `own_pids`: it is process 1 in a namespace of pids, where commands that
    follow are as well; there can be one at a time.
    """

    argv: list[Word] = Field(default_factory=list)
    env: dict[Word, Word] | None = None
    cwd: Word | None = None
    user: Word | None = None
    timeout: Timeout | None = None
    pty: TerminalSize | None = None
    stdin: bool = False
    background: bool = False
    main: bool = False
    own_pids: bool = False
    attach: int | None = None

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        if bool(self.argv) == (self.attach is not None):
            raise ValueError("give argv, to start a program, or attach, the pid of one")
        return self


class ExecSaying(Request):
    """What may be said later: no more input, another size, a signal."""

    eof: bool = False
    resize: TerminalSize | None = None
    signal: Annotated[int, Field(ge=1, le=64)] | None = None


class SignalRequest(Request):
    signal: Annotated[int, Field(ge=1, le=64)]


class EvalOpening(Request):
    """What is said first on `eval/stream`."""

    code: Annotated[str, Field(max_length=1 << 21)]
    timeout: Timeout | None = None


class EvalRequest(Request):
    """Python for the sandbox's warm interpreter, which keeps its state from call to call."""

    code: Annotated[str, Field(max_length=1 << 21)]
    timeout_secs: Timeout = 30


@dataclass(frozen=True)
class EvalAnswer(EvalResult):
    """How code ended.

    `result` is the `repr` of the last statement, where that is an expression whose value is not
    None; `error` the traceback, or what else went wrong. `exit_code`: 0, 1 for an exception, 124
    timed out. `state_lost`: the interpreter is gone with all that was in it, and the next call
    starts a new one.
    """

    # This daemon always says so.
    timed_out: bool = field()
    state_lost: bool = field()
    truncated: bool = field()
