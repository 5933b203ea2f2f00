"""Shell scripts in the place of the programs that read and write disks, in their cell."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from ratoon.store.disk import tools

SHELL = "busybox"


@contextmanager
def scripts(directory: Path, texts: Mapping[str, str]) -> Iterator[None]:
    """While the block runs, `texts` are the programs of these names, and there are no others.

    They lie in `directory`, and so does what is built of them.
    """
    for name, text in texts.items():
        (directory / name).write_text(f"#!/usr/bin/{SHELL} sh\n{text}\n")
        (directory / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
        patch.setenv("RATOON_CACHE", str(directory / "cache"))
        patch.setattr(tools, "PROGRAMS", (*texts, SHELL))
        patch.setattr(tools, "_LIBRARIES", ())
        with looked_for_again():
            yield


@contextmanager
def looked_for_again() -> Iterator[None]:
    """The programs are looked for anew in the block, and after it."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    if tools.disk_cell.cache_info().currsize:
        tools.disk_cell().close()
    tools.disk_cell.cache_clear()
    tools._path.cache_clear()
