"""The format of a store: `store.json` names it, and nothing else tells it.

There is one format so far. A store of any other is refused: what an older one would be upgraded
by, and what a newer one means, is for the Ratoon that knows both.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from ratoon import files
from ratoon.documents import Document
from ratoon.errors import Corrupt, Incompatible

FORMAT = 1


class _StoreFile(Document):
    format: int


def claim_format(home: Path, content: Iterable[Path]) -> None:
    """Mark a new store in `home` with the format, or make sure that it has it.

    `content` are the directories that only a store in use has something in. Incompatible: another
    format, or `store.json` is missing though there is content. Corrupt: it makes no sense.
    """
    path = home / "store.json"
    try:
        found = _StoreFile.load(path).format
    except FileNotFoundError:
        if used := _first(content):
            raise Incompatible(
                f"{path} is missing, but there is {used}: the store's format is unknown; "
                "restore that file or use a new home"
            ) from None
        files.write_durable(path, _StoreFile(format=FORMAT).model_dump_json().encode() + b"\n")
        return
    except ValidationError as error:
        raise Corrupt(f"{path}: not what Ratoon wrote; restore it or use a new home") from error
    if found != FORMAT:
        age = "a newer" if found > FORMAT else "an older"
        raise Incompatible(
            f"{path}: format {found}, but this Ratoon uses format {FORMAT}; the store was made "
            f"by {age} Ratoon: use that, or a new home"
        )


def _first(directories: Iterable[Path]) -> Path | None:
    for directory in directories:
        with suppress(FileNotFoundError):
            for path in directory.iterdir():
                return path
    return None
