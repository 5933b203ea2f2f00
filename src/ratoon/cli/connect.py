"""Verbs that talk to a daemon: which one it is, and what becomes of its errors."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from ratoon.cli.app import app, complain, enter_user_namespace, explain, run, say
from ratoon.cli.options import fork_options, image_options
from ratoon.errors import RatoonError

if TYPE_CHECKING:
    from ratoon.client.aio.client import AsyncClient

Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="The daemon; by default what RATOON_URL says, or this host's."
    ),
]
Token = Annotated[
    str | None, typer.Option(metavar="TOKEN", help="Its token; by default that in RATOON_TOKEN.")
]
T = TypeVar("T")
Asked = Coroutine[Any, Any, T]
Main = Callable[..., Asked[None]]

#: Parameters that stand for several options, and what makes their value of those.
_GROUPS: dict[str, Callable[..., Any]] = {"options": fork_options, "of_image": image_options}


async def _with_daemon(daemon_url: Url = None, daemon_token: Token = None) -> None:
    """The options that each of these verbs has besides its own."""


def client_command(
    name: str, *, start: bool = True, failure: int | None = None, takes_all: bool = False
) -> Callable[[Main], Main]:
    """Make `function(client, …)` the verb `name`.

    A parameter `options` is all that forks may have, and `of_image` what is for images alone.

    If no daemon is named and this host's own is not running, it is started, or without `start` an
    engine in this process takes its place. `failure` is the exit code of Ratoon's own failures,
    where that is not the error's. `takes_all`: what follows the first argument is not looked at.
    """

    def decorate(function: Main) -> Main:
        own = _parameters(function)
        groups = {each: _parameters(_GROUPS[each]) for each in own.keys() & _GROUPS.keys()}
        flat = {each: own[each] for each in own if each != "client" and each not in groups}
        for group in groups.values():
            flat |= group
        flat |= _parameters(_with_daemon)

        @wraps(function)
        def verb(daemon_url: str | None, daemon_token: str | None, **values: Any) -> None:
            for group, members in groups.items():
                given = {each: values.pop(each) for each in members}
                values[group] = _GROUPS[group](**given)
            try:
                run(_main(function, values, daemon_url, daemon_token, start=start))
            except RatoonError as error:
                if failure is None:
                    raise
                complain(explain(error))
                raise typer.Exit(failure) from None

        required_first = sorted(flat.values(), key=lambda each: each.default is not each.empty)
        verb.__signature__ = inspect.Signature(required_first)  # type: ignore[attr-defined]
        verb.__annotations__ = {each.name: each.annotation for each in required_first}
        del verb.__wrapped__
        settings = {"allow_interspersed_args": False} if takes_all else {}
        app.command(name, context_settings=settings)(verb)
        return function

    return decorate


async def _main(
    function: Main, values: dict[str, Any], url: str | None, token: str | None, *, start: bool
) -> None:
    async with _client(url, token, start=start) as client:
        await function(client, **values)


def is_named(daemon_url: str | None) -> bool:
    """Whether somebody said which daemon is meant."""
    from ratoon.client.address import url_of_environment

    return bool(daemon_url or url_of_environment())


async def ask(
    daemon_url: str | None, daemon_token: str | None, question: Callable[[AsyncClient], Asked[T]]
) -> T:
    """What the daemon that was named answers."""
    async with _client(daemon_url, daemon_token, start=False) as client:
        return await question(client)
    raise AssertionError


async def all_of(works: Iterable[Asked[None]]) -> None:
    """Do each, whatever becomes of the others; the first error is raised then."""
    import asyncio

    outcomes = await asyncio.gather(*works, return_exceptions=True)
    failed = [each for each in outcomes if isinstance(each, BaseException)]
    for each in failed[1:]:
        complain(explain(each) if isinstance(each, RatoonError) else str(each))
    if failed:
        raise failed[0]


@asynccontextmanager
async def _client(url: str | None, token: str | None, *, start: bool) -> AsyncIterator[AsyncClient]:
    from ratoon import paths
    from ratoon.client.address import token_of_environment, url_of_environment
    from ratoon.client.aio.client import AsyncClient
    from ratoon.client.local import LocalDaemon, serves

    url, token = url or url_of_environment(), token or token_of_environment()
    if url:
        async with AsyncClient(url, token=token) as client:
            yield client
    elif start or serves(paths.home(), paths.daemon_socket(paths.home())):
        async with AsyncClient.of(LocalDaemon(token, say)) as client:
            yield client
    else:
        try:
            enter_user_namespace()
            async with AsyncClient.embedded() as client:
                yield client
        except RatoonError as error:
            error.answered = None  # there is no HTTP that anybody would know of
            raise


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """With annotations that are no text any more."""
    hints = get_type_hints(
        function,
        localns={"AsyncClient": Any, "Options": Any, "ImageOptions": Any},
        include_extras=True,
    )
    return {
        name: each.replace(annotation=hints[name], kind=each.KEYWORD_ONLY)
        for name, each in inspect.signature(function).parameters.items()
    }
