"""What pydantic finds wrong with a document or a request, as a person is to read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


def complaint(error: Mapping[str, Any]) -> str:
    """One of the `errors()` of pydantic or FastAPI: where it is wrong, unless all is, and how."""
    where = ".".join(map(str, error["loc"]))
    # What a validator of ours says is a sentence already.
    what = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def first_error(error: ValidationError) -> str:
    """Where a document is wrong, and how. One with very many errors is not worth their listing."""
    if error.error_count() > 100:
        return f"{error.error_count()} errors"
    return complaint(error.errors(include_url=False, include_context=False, include_input=False)[0])
