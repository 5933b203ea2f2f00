"""Makes `ratoon.client.sync` from `ratoon.client.aio`; with --check, says whether it is up to date.

Names and keywords are replaced one by one, in code, docstrings and comments alike, and then `ruff`
formats what comes out. What cannot be made that way is in modules that are written by hand on both
sides.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).parent.parent / "src/ratoon/client"
SOURCE, TARGET = CLIENT / "aio", CLIENT / "sync"
BY_HAND = {"__init__.py", "concurrency.py", "conversations.py", "transport.py"}

HEADER = "# Made from ../aio/{name} by scripts/make_sync.py: change it there.\n"

#: In this order; whole words only.
WORDS = [
    (r"async (def|with|for)\b", r"\1"),
    (r"await ", ""),
    (r"Async(?=[A-Z])", ""),
    (r"asynccontextmanager\b", "contextmanager"),
    (r"aclosing\b", "closing"),
    (r"Generator\[(\w+), None\]", r"Generator[\1, None, None]"),
    (r"(enter|push|pop)_async_(\w+)", r"\1_\2"),
    (r"__a(enter|exit|iter|next)__", r"__\1__"),
    (r"a(close|read|iter_raw|next|iter)\(", r"\1("),
    (r"client\.aio\b", "client.sync"),
    (r"aio\b", "sync"),
]

#: Imports in order and none too many; and what only one of the two can say: `yield from`, two
#: blocks in one line.
FIX = ["check", "--select=I,F401,UP028,SIM117", "--fix-only", "--unsafe-fixes", "--quiet"]


def main() -> int:
    made = {
        path.name: make(path) for path in sorted(SOURCE.glob("*.py")) if path.name not in BY_HAND
    }
    there = {path.name: path.read_text() for path in TARGET.glob("*.py")}
    stale = sorted(name for name, text in made.items() if there.get(name) != text)
    stray = sorted(there.keys() - made.keys() - BY_HAND)
    if "--check" in sys.argv[1:]:
        if stale or stray:
            names = ", ".join([*stale, *stray])
            print(f"src/ratoon/client/sync is out of date ({names}): run scripts/make_sync.py")
        return 1 if stale or stray else 0
    for name in stale:
        (TARGET / name).write_text(made[name])
    for name in stray:
        (TARGET / name).unlink()
    return 0


def make(path: Path) -> str:
    text = path.read_text()
    for word, replacement in WORDS:
        text = re.sub(rf"\b{word}", replacement, text)
    return formatted(HEADER.format(name=path.name) + text, TARGET / path.name)


def formatted(text: str, path: Path) -> str:
    """As `ruff` wants it: imports in order, lines joined that now fit."""
    ruff = Path(sys.executable).with_name("ruff")
    for arguments in (FIX, ["format"]):
        done = subprocess.run(
            [ruff, *arguments, f"--stdin-filename={path}", "-"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        )
        text = done.stdout
    return text


if __name__ == "__main__":
    sys.exit(main())
