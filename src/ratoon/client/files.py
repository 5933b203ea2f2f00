"""How requests speak of files."""

from __future__ import annotations

import os
from collections.abc import Callable

from ratoon.errors import InvalidInput

#: A path in a guest.
GuestPath = str | bytes | os.PathLike[str]
#: Called with the bytes that have been carried so far.
OnBytes = Callable[[int], object]


def guest_path(path: GuestPath) -> str:
    """As a query has it; InvalidInput if no file can be called so."""
    raw = os.fspath(path)
    text = raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else raw
    if not text or "\0" in text:
        raise InvalidInput(f"{text!r} cannot be a path in a guest")
    return text


def octal(mode: int | None) -> str | None:
    return None if mode is None else f"{mode:03o}"
