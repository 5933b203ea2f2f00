"""Parameters of a query, byte for byte."""

from __future__ import annotations

from urllib.parse import parse_qsl

from starlette.requests import HTTPConnection


def raw_parameter(connection: HTTPConnection, name: str) -> str:
    """A parameter that is there, as it was sent: elsewhere, bytes that are not UTF-8 are replaced.

    They become lone surrogates, as with `os.fsdecode`.
    """
    query: bytes = connection.scope["query_string"]
    pairs = parse_qsl(
        query.decode("latin-1"),
        keep_blank_values=True,
        errors="surrogateescape",
    )
    return dict(pairs)[name]
