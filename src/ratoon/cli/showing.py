"""How values are shown to people."""

from __future__ import annotations

MIB = 1024 * 1024


def age(seconds: float) -> str:
    """A time that has passed, in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def printable(text: str | None) -> str:
    """Text that came from elsewhere, without what a terminal would obey."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text or ""
    )
