"""The logs of a machine: their end is told, and they stay small while they are written to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ratoon.machine.vmm import command, logs
from ratoon.machine.vmm.logs import bound_logs, log_tail


def test_the_end_of_the_logs_console_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert log_tail(log) == ""
    log.write_bytes(b"qemu: \xff bad\n")
    assert log_tail(log) == "qemu: \ufffd bad"
    command.console_log(log).write_text("x" * 10_000 + "panic\n")
    console, _, own = log_tail(log).rpartition("\n")
    assert own == "qemu: \ufffd bad"
    assert console.endswith("xpanic")
    assert len(console) <= logs.TAIL_BYTES


@pytest.mark.parametrize("which", [Path, command.console_log])
def test_a_log_that_has_grown_too_long_is_cut_in_place(
    tmp_path: Path, which: Callable[[Path], Path]
) -> None:
    log = tmp_path / "log"
    path = which(log)
    line = b"one more line of what the guest says\n"
    count = logs.LIMIT_BYTES // len(line) + 2
    writer = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(writer, line * count)
        bound_logs(log)
        os.write(writer, b"the last words\n")
    finally:
        os.close(writer)
    first, _, rest = path.read_bytes().partition(b"\n")
    assert rest == (line * count)[-logs.KEPT_BYTES :] + b"the last words\n"
    assert first == b"[cut here: %d bytes before]" % (count * len(line) - logs.KEPT_BYTES)
    assert log_tail(log).endswith("the last words")


def test_a_log_that_is_short_or_missing_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * logs.LIMIT_BYTES)
    before = log.stat()
    bound_logs(log)
    assert log.stat() == before
    assert not command.console_log(log).exists()
