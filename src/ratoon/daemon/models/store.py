"""The store as a whole, the pool and named volumes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ratoon.daemon.models.common import Request


class CheckRequest(Request):
    """`read_data`: compare all data with its digests; `subset`, `n/t`: part n of t of it."""

    read_data: bool = False
    subset: str | None = None


class PoolRequest(Request):
    """How many machines shall wait; 0: none."""

    size: Annotated[int, Field(ge=0, le=1000)]


class CreateVolume(Request):
    """`name`: up to 64 lower-case letters, digits, `-`, `_` and `.`."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
