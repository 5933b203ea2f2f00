"""What apt says, remembered: it takes a second to say anything.

`apt/KEY.json` in the cache, one for each question, has its last answer and the state of what apt's
answers come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from ratoon import paths
from ratoon.artifacts import run
from ratoon.documents import Document

#: What apt's answers come from: its configuration, the lists that it has, what is installed.
SOURCES = tuple(
    Path(each)
    for each in ("/etc/apt", "/var/lib/apt/lists", "/var/lib/dpkg/status", "/var/lib/dpkg/arch")
)


class _Answer(Document):
    question: list[str]
    state: str
    answer: str


def ask(question: Sequence[str]) -> str:
    """What a command of apt's prints that changes nothing; HostError."""
    state = _state()  # before the answer, which is of this state or a later one
    path = paths.cache() / "apt" / f"{blake3(' '.join(question).encode()).hexdigest()[:24]}.json"
    found = _Answer.load_or_none(path)
    if found and (found.question, found.state) == ([*question], state):
        return found.answer
    answer = run(question, cwd=Path("/")).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    _Answer(question=[*question], state=state, answer=answer).save(path)
    return answer


def _state() -> str:
    """A digest of the names and stamps of all files below SOURCES; their content is not read.

    Directories are left out: an `apt-get update` that brings nothing changes theirs alone.
    """
    every = (path for source in SOURCES for path in (source, *sorted(source.rglob("*"))))
    stamps = []
    for path in every:
        try:
            status = path.stat()
        except FileNotFoundError:  # there is no such file here, or it went just now
            continue
        if not path.is_dir():
            stamps.append(f"{path} {status.st_ino} {status.st_size} {status.st_mtime_ns}")
    return blake3("\n".join(stamps).encode()).hexdigest()
