"""`ratoon serve`: the daemon, in the foreground."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ratoon.cli.app import app, enter_user_namespace, run, say
from ratoon.errors import InvalidInput


@app.command("serve")
def serve(
    bind: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Listen there too, such as on 127.0.0.1:8889."),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Has the token that every request must bear.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate for HOST:PORT.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its PEM key.")] = None,
    stop_sandboxes: Annotated[
        bool, typer.Option("--stop-sandboxes", help="End the sandboxes with the daemon.")
    ] = False,
    branch_cap: Annotated[int, typer.Option(min=1, help="Branches at a time.")] = 4,
    image_root: Annotated[
        list[Path] | None,
        typer.Option(help="Images, kernels and disks may be taken from below this directory."),
    ] = None,
    volume_root: Annotated[
        list[Path] | None,
        typer.Option(help="Who asks over TCP may have volumes of directories below this one."),
    ] = None,
    text_log: Annotated[
        bool, typer.Option("--text-log", help="Log for people; else a JSON object in each line.")
    ] = False,
) -> None:
    """Serve the store over HTTP until interrupted.

    It listens on a unix socket, and on TCP if asked to.

    Sandboxes live on when the daemon ends, and the next one takes them over. One daemon serves a
    store; a second one is refused.
    """
    enter_user_namespace()
    # Here, so that no other verb waits for it.
    from ratoon.daemon.auth import read_token
    from ratoon.daemon.logs import log_as_json
    from ratoon.daemon.serve import Serving, Tls, serve
    from ratoon.daemon.settings import Settings

    if (tls_cert is None) != (tls_key is None):
        raise InvalidInput("--tls-cert and --tls-key: give both, or none")
    if tls_cert and not bind:
        raise InvalidInput("--tls-cert is for TCP: give --bind too")
    serving = Serving(
        bind=bind,
        tls=Tls(tls_cert, tls_key) if tls_cert and tls_key else None,
        settings=Settings(
            token=read_token(token_file) if token_file else None,
            branch_cap=branch_cap,
            image_roots=tuple(image_root or ()),
            volume_roots=tuple(volume_root or ()),
        ),
        stop_sandboxes=stop_sandboxes,
    )
    if not text_log:
        log_as_json(logging.INFO)
    run(serve(serving, _started))


def _started(urls: Sequence[str]) -> None:
    say(f"serving on {' and '.join(urls)}")
