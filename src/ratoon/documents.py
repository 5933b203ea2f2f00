"""Documents: what is kept as JSON, with fields that are known and values that cannot change."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ratoon.files import write_durable


class Document(BaseModel):
    """A document, or a part of one.

    Strict where nothing else is said: what is read must have the types that are written. Parts that
    users fill in, too, are `strict=False`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The document at `path`. FileNotFoundError; ValidationError: it makes no sense."""
        return cls.model_validate_json(path.read_bytes())

    @classmethod
    def load_or_none(cls, path: Path) -> Self | None:
        """The same; None where there is none that makes sense, as with what can be made again."""
        try:
            return cls.load(path)
        except (FileNotFoundError, ValidationError):
            return None

    def save(self, path: Path) -> None:
        """Put it at `path`, in a directory that is there; readers see the old one or this, whole.

        It survives a power loss once this returns.
        """
        write_durable(path, self.model_dump_json(indent=2).encode() + b"\n")
