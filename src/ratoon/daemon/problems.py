"""Errors as answers: a status, and a body that a person can act on.

The status of a RatoonError is its own. Of a request that cannot be right, it is 422 where a type is
wrong or a field is missing, and 400 for what is not JSON, or a value that may not be.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ratoon import files
from ratoon.daemon.models.common import ErrorAnswer
from ratoon.daemon.responses import AsciiJson
from ratoon.errors import RatoonError
from ratoon.validation import complaint

log = logging.getLogger(__name__)

#: What pydantic calls a value of the right type that is not allowed all the same.
_BAD_VALUES = (
    *("greater_than", "less_than", "finite_number", "too_long", "too_short", "string_too"),
    *("string_pattern", "value_error", "multiple_of", "json_invalid"),
)

#: The status of an answer to a client that has gone away: nginx's.
_NOBODY_READS = 499

#: What each status of an error means, for OpenAPI. Those of `ratoon.errors` are among them.
MEANINGS = {
    400: "The request cannot be right.",
    401: "The bearer token is missing or wrong.",
    403: "Not allowed.",
    404: "There is no such thing.",
    409: "The state of things forbids it.",
    413: "The body is too large.",
    422: "A field has the wrong type, or is missing.",
    500: "It failed; the text says why.",
    502: "A registry of images does not do as it should.",
    503: "Not now; the text has the figures.",
    504: "It took too long.",
    507: "There is no room on a disk.",
}


def error_answer(error: RatoonError) -> ErrorAnswer:
    details = {name: value for name, value in vars(error).items() if not name.startswith("_")}
    return ErrorAnswer(error=str(error), kind=type(error).__name__, details=details)


def error_fields(error: RatoonError) -> dict[str, Any]:
    """The same as JSON, without what says nothing."""
    return error_answer(error).model_dump(mode="json", exclude_defaults=True)


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: the errors that a route may answer with, besides those that all may."""
    return {
        status: {"model": ErrorAnswer, "description": MEANINGS[status]}
        for status in sorted({*statuses, 401, 403, 413, 422, 500, 504})
    }


def error_response(status: int, text: str, kind: str, **headers: str) -> JSONResponse:
    return AsciiJson({"error": text, "kind": kind}, status, headers)


def install(app: FastAPI) -> None:
    """Have every error of `app` answered as JSON."""

    @app.exception_handler(RatoonError)
    async def _ratoon(request: Request, error: RatoonError) -> JSONResponse:
        return AsciiJson(error_fields(error), error.http_status)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(*explain(error.errors()), "InvalidInput")

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, error.detail, "HTTP", **(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def _gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_NOBODY_READS)

    @app.exception_handler(OSError)
    async def _system(request: Request, error: OSError) -> JSONResponse:
        log.error("%s %s: %s", request.method, request.url.path, error, exc_info=error)
        return error_response(500, files.describe(error), "HostError")

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        # It is raised on, and logged by the server.
        return error_response(500, f"unexpected {type(error).__name__}: {error}", "Bug")


def explain(errors: Sequence[Any]) -> tuple[int, str]:
    """The status, and where the request is wrong."""
    bad_value = all(error["type"].startswith(_BAD_VALUES) for error in errors)
    shown = [_describe(error) for error in errors[:5]]
    if len(errors) > len(shown):
        shown.append(f"and {len(errors) - len(shown)} more")
    return 400 if bad_value else 422, "; ".join(shown)


def _describe(error: Any) -> str:
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']}"
    return complaint(error)
