"""What all requests have in common, and all answers that are errors.

Requests are strict about types, and what they do not know they ignore.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Port = Annotated[int, Field(ge=1, le=65535)]
#: How long something may be waited for, in seconds.
Timeout = Annotated[float, Field(gt=0, le=86400)]
#: Text that goes to a program in the guest, which ends at a NUL.
Word = Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=1 << 20)]


#: At most 64 short pairs; they are written down with the sandbox.
Metadata = Annotated[
    dict[
        Annotated[str, Field(min_length=1, max_length=256)], Annotated[str, Field(max_length=4096)]
    ],
    Field(max_length=64),
]
#: How many sandboxes at once.
Many = Annotated[int, Field(ge=1, le=1000)]


class Request(BaseModel):
    """A body that a client sends."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ErrorAnswer(BaseModel):
    """What went wrong, for a person; `kind` is its class in `ratoon.errors`, for a program.

    `details`: what else that class knows, such as the `dependents` of a snapshot.
    """

    model_config = ConfigDict(frozen=True)

    error: str
    kind: str
    details: dict[str, str | int | float | list[str] | None] = {}
