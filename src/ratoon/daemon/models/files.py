"""Files in a guest, as JSON has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import PlainSerializer

from ratoon.api import files


@dataclass(frozen=True)
class FileInfo(files.FileInfo):
    """A file in a guest. `mode` is its permission bits in octal, `target` what a link says."""

    mode: Annotated[int, PlainSerializer(lambda mode: f"{mode:04o}", return_type=str)] = field()


@dataclass(frozen=True)
class Extracted(files.Transfer):
    """Of an archive: the things in it, its bytes, and what was left out of it, and why."""
