"""Errors of a daemon, made into what they were before they went over the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ratoon import errors
from ratoon.client.address import Address
from ratoon.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    Overloaded,
    RatoonError,
    Unauthorized,
    Unreachable,
)


class ConnectionLost(Exception):
    """A connection ended before all was said."""


#: What a status means where the answer does not name a class, or one of another version.
_BY_STATUS: dict[int, type[RatoonError]] = {
    400: InvalidInput,
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    409: Conflict,
    422: InvalidInput,
    503: Overloaded,
}


def error_from(status: int, answer: Any) -> RatoonError:
    """The error that a daemon answered with; `answered` is the status.

    `answer` is the body: JSON in bytes, or what was in it.
    """
    fields = _parsed(answer)
    text = fields.get("error")
    if not isinstance(text, str):
        text = f"the daemon answered with HTTP status {status}, and did not say why"
    known = getattr(errors, str(fields.get("kind")), None)
    if not (isinstance(known, type) and issubclass(known, RatoonError)):
        known = _BY_STATUS.get(status, RatoonError)
    error = known.__new__(known, text)
    details = fields.get("details")
    vars(error).update(details if isinstance(details, dict) else {})
    error.answered = status
    return error


@contextmanager
def explained(address: Address) -> Iterator[None]:
    """Raise Unreachable where the daemon at `address` is gone."""
    try:
        yield
    except ConnectionLost as error:
        raise Unreachable(
            f"the daemon at {address} went away before it had answered: {_reason(error)}; "
            "what was asked for may have been done, or not"
        ) from error


@contextmanager
def cut_short(what: str) -> Iterator[None]:
    """Raise Unreachable where not all of `what` comes, although it had begun."""
    try:
        yield
    except ConnectionLost as error:
        raise Unreachable(
            f"{what} was cut short: the sandbox, or the daemon, is gone, or could not read on; "
            "the daemon's log says more"
        ) from error


def unreachable(address: Address, error: Exception) -> Unreachable:
    """The error for a daemon that could not be connected to."""
    return Unreachable(
        f"no daemon answers at {address}: {_reason(error)}; "
        "start one with `ratoon serve`, or set RATOON_URL to where one is"
    )


def _reason(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__ or cause
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return str(error) or type(error).__name__


def _parsed(answer: Any) -> dict[str, Any]:
    if isinstance(answer, bytes):
        try:
            answer = json.loads(answer)
        except ValueError:
            answer = None
    return answer if isinstance(answer, dict) else {}
