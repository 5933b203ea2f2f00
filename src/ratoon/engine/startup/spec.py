"""What is to be run: an image, a command in it, and how to tell that it is up."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field
from pydantic_core import SchemaError, SchemaValidator, ValidationError, core_schema

from ratoon.documents import Document
from ratoon.engine.sandbox.base import DISK_BYTES, RAM_BYTES
from ratoon.engine.sandbox.options import Seconds

#: Characters that a regular expression may have: it is compiled into a machine of bounded size.
PATTERN_LIMIT = 1000
#: What names this guest in a health check's URL.
_LOOPBACK = ("", "localhost", "127.0.0.1", "::1")


class _Health(Document):
    """`interval_seconds` lie between two attempts, each of which may take `timeout_seconds`.

    `within_seconds` of its start the command must have passed one.
    """

    interval_seconds: Seconds = 0.2
    timeout_seconds: Seconds = 30.0
    within_seconds: Seconds = 600.0

    @property
    def checked(self) -> dict[str, Any]:
        """What is checked, without how often and for how long."""
        return self.model_dump(mode="json", exclude=set(_Health.model_fields))


def _in_the_guest(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{url[:200]!r} is no URL: {error}") from None
    if parts.scheme != "http" or (parts.hostname or "") not in _LOOPBACK or "@" in parts.netloc:
        raise ValueError(
            f"{url[:200]!r}: write http://:PORT/PATH, which is asked of the guest itself"
        )
    if port == 0 or parts.fragment or not url.isprintable() or " " in url or not url.isascii():
        raise ValueError(f"{url[:200]!r}: it has no port, or a part that no request can have")
    query = f"?{parts.query}" if parts.query else ""
    return f"http://:{port or 80}{parts.path or '/'}{query}"


class HttpHealth(_Health):
    """A GET of `url`, `http://:PORT/PATH` in the guest, is answered with a status below 400.

    It is made from the host, through the agent: nothing need be published.
    """

    kind: Literal["http"] = "http"
    url: Annotated[str, Field(max_length=2000), AfterValidator(_in_the_guest)]

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None, "the URL was made so"
        return port

    @property
    def target(self) -> str:
        """What is asked for: path and query."""
        return "/" + self.url.split("/", 3)[3]


class CommandHealth(_Health):
    """`argv`, run in the guest as the command itself is, exits with 0."""

    kind: Literal["command"] = "command"
    argv: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=1 << 20)], ...],
        Field(min_length=1, strict=False),
    ]


def _searchable(pattern: str) -> str:
    _searcher(pattern)
    return pattern


def _searcher(pattern: str) -> SchemaValidator:
    """Finds `pattern` in time linear in the text, whatever the pattern.

    It is Rust's engine, which pydantic has for its own patterns; Python's may take for ever.
    """
    try:
        pattern.encode()
        return SchemaValidator(core_schema.str_schema(pattern=pattern))
    except (SchemaError, UnicodeError) as error:
        why = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{pattern[:200]!r} is no regular expression here: {why}") from None


class LogHealth(_Health):
    """The command has written a line, to stdout or stderr, in which `pattern` is found.

    The syntax is that of Rust's `regex`: no look-around, no references back.
    """

    kind: Literal["log"] = "log"
    pattern: Annotated[
        str, Field(min_length=1, max_length=PATTERN_LIMIT), AfterValidator(_searchable)
    ]

    @cached_property
    def _found_by(self) -> SchemaValidator:
        return _searcher(self.pattern)

    def is_in(self, line: str) -> bool:
        try:
            self._found_by.validate_python(line)
        except ValidationError:
            return False
        return True


Health = HttpHealth | CommandHealth | LogHealth


class RunSpec(Document):
    """What is run. `command` takes the place of the image's own, after its entrypoint.

    An `entrypoint` takes the place of the image's, and of its command. It is process 1 of its own
    processes, unless there is to be an `init`: the agent, then.
    Without `health` nobody waits for the command, and there is nothing to keep of it. Its
    environment, user and directory, and what the sandbox may reach and use, are in its
    `SandboxOptions`.
    """

    image: str
    command: Annotated[tuple[str, ...], Field(strict=False)] = ()
    entrypoint: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    init: bool = False
    ram_bytes: int = RAM_BYTES
    vcpus: int = 1
    disk_bytes: int = DISK_BYTES
    cpu: str | None = None
    health: Annotated[Health, Field(discriminator="kind")] | None = None
