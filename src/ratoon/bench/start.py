"""The same web application run twice by `ratoon run`: until its first good answer.

Django from PyPI with its database, in an image made here, on a port of the host, as its user would
run it. The second run is measured some times, each beside what it cannot do without: a fork of the
same snapshot and one request to it, and the command line's own start.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ratoon.artifacts import run
from ratoon.bench.bench import Bench, Workshop
from ratoon.bench.plots import Plot, Series
from ratoon.bench.samples import Samples, milliseconds
from ratoon.bench.tables import Table, Target, spread
from ratoon.errors import RatoonError

PROGRAM = Path(sys.executable).with_name("ratoon")
#: Seconds until the application must have answered.
LIMIT = 600
APPLICATION = """
import sys
from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpResponse
from django.urls import path
settings.configure(
    DEBUG=False, ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="bench",
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "/opt/app/db"}},
    INSTALLED_APPS=["django.contrib." + name for name in (
        "admin", "auth", "contenttypes", "sessions", "messages")],
    MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware"],
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates", "OPTIONS": {
        "context_processors": ["django.template.context_processors.request",
            "django.contrib.auth.context_processors.auth",
            "django.contrib.messages.context_processors.messages"]}}])
def answer(request):
    from django.contrib.auth.models import User
    return HttpResponse(f"{User.objects.count()} users\\n")
urlpatterns = [path("", answer)]
execute_from_command_line(["app", "migrate", "--verbosity", "0"])
execute_from_command_line(["app", "runserver", "--noreload", "0.0.0.0:8000"])
"""
ANSWER = b"0 users\n"
PARTS = {
    "first": "first run: the image is booted, the command started and waited for",
    "second": "second run: a fork of what was kept",
    "fork": "a fork of the same snapshot, and one request to it",
    "program": "the command line's own start: `ratoon ls`",
}


@dataclass(frozen=True)
class Took:
    """What one of PARTS took, until the first good answer; `tier` of a run is where it started."""

    what: str
    round: int
    tier: int
    ms: float


@dataclass(frozen=True)
class StageOfRun:
    """A stage of a run, within the daemon."""

    what: str
    round: int
    stage: str
    ms: float


async def measure(shop: Workshop) -> Samples:
    return await asyncio.to_thread(_measure, shop)


def _measure(shop: Workshop) -> Samples:
    took: list[Took] = []
    stages: list[StageOfRun] = []
    shop.say("making an image with Django from PyPI")
    image = _make_image(shop.room)
    places = {"RATOON_HOME": str(shop.room / "home"), "RATOON_RUNTIME": str(shop.room / "r")}
    with _daemon(places) as ratoon:

        def once(what: str, number: int) -> str:
            ms, told = _run(ratoon, image)
            took.append(Took(what, number, told["tier"], ms))
            spent = told["stages_ms"].items()
            stages.extend(StageOfRun(what, number, each, round(ms, 3)) for each, ms in spent)
            return str(told["tag"])

        shop.say("the first run")
        once("first", 0)
        _run(ratoon, image)  # for warming up
        for number in range(shop.iterations):
            shop.say(f"second run, round {number + 1} of {shop.iterations}")
            tag = once("second", number)
            took.append(Took("fork", number, 0, _fork(ratoon, tag)))
            began = time.perf_counter()
            ratoon("ls")
            took.append(Took("program", number, 0, milliseconds(time.perf_counter() - began)))
    return {"start": took, "start-stages": stages}


def _make_image(room: Path) -> str:
    """A Debian with Python, and the application with what it needs from PyPI, as a tarball."""
    tree, tarball = room / "tree", room / "image.tar"
    include = "--include=python3,python3-sqlparse"
    run(["mmdebstrap", "--quiet", "--variant=minbase", include, "bookworm", tree])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--target", tree / "opt/app", "django>=4.2,<5"])
    (tree / "opt/app/app.py").write_text(APPLICATION)
    run(["tar", "-C", tree, "-cf", tarball, "."])
    return f"tar:{tarball}"


class _Ratoon:
    """The program, as a process, with a store of its own."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._environment = {**os.environ, **places}
        # An installed program has its bytecode; a checkout may be told to keep none.
        for name in ("RATOON_URL", "PYTHONDONTWRITEBYTECODE"):
            self._environment.pop(name, None)
        self.socket = Path(places["RATOON_RUNTIME"], "daemon.sock")

    def __call__(self, *arguments: str | Path) -> str:
        done = subprocess.run(
            [PROGRAM, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RatoonError(f"ratoon {arguments[0]} failed: {done.stderr[-2000:]}")
        return done.stdout

    def serve(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [PROGRAM, "serve", "--stop-sandboxes"],
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@contextmanager
def _daemon(places: Mapping[str, str]) -> Iterator[_Ratoon]:
    """The program, with a daemon that answers."""
    ratoon = _Ratoon(places)
    serving = ratoon.serve()
    try:
        while not ratoon.socket.exists():
            if serving.poll() is not None:
                raise RatoonError(f"the daemon ended with {serving.returncode}")
            time.sleep(0.1)
        yield ratoon
    finally:
        serving.terminate()
        serving.wait()


def _run(ratoon: _Ratoon, image: str) -> tuple[float, dict[str, Any]]:
    """Milliseconds from the command to the first good answer, and what the command told."""
    port = _free_port()
    began = time.perf_counter()
    told = json.loads(
        ratoon(
            *("run", "-d", "--json", "--health", "http://:8000/", "-p", f"{port}:8000", image),
            *("--", "python3", "/opt/app/app.py"),
        )
    )
    _until_answered(port)
    took = milliseconds(time.perf_counter() - began)
    ratoon("kill", told["id"])
    return took, told["run"] | {"tag": told["snapshot_tag"]}


def _fork(ratoon: _Ratoon, tag: str) -> float:
    """Milliseconds of a fork of `tag` over HTTP, and of the first request to it."""
    from ratoon.client.sync.client import Client

    port = _free_port()
    with Client(f"unix://{ratoon.socket}") as client:
        client.version()
        began = time.perf_counter()
        sandbox = client.fork(tag, publish={8000: port})[0]
        _until_answered(port)
        took = milliseconds(time.perf_counter() - began)
        ratoon("kill", sandbox.id)  # type: ignore[union-attr]  # it has answered
    return took


def _until_answered(port: int) -> None:
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=LIMIT) as answer:
                if (said := answer.read()) != ANSWER:
                    raise RatoonError(f"the application answered {said[:100]!r}")
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RatoonError(f"no answer within {LIMIT} s: {error}") from error


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _times(samples: Samples, what: str) -> list[float]:
    return [row.ms for row in samples["start"] if row.what == what]


def tables(samples: Samples) -> Sequence[Table]:
    cells = [
        (name, str(len(times)), spread(times))
        for what, name in PARTS.items()
        if (times := _times(samples, what))
    ]
    rows = samples["start-stages"]
    kinds = dict.fromkeys((row.what, row.stage) for row in rows)
    spent = [
        (what, stage, spread(r.ms for r in rows if (r.what, r.stage) == (what, stage)))
        for what, stage in kinds
    ]
    columns = ("until the first good answer, ms", "n", "median (least…most)")
    return [
        Table("One web application, run twice", columns, tuple(cells), ("start",)),
        Table("Within the daemon", ("run", "stage", "ms"), tuple(spent), ("start-stages",)),
    ]


def targets(samples: Samples) -> Sequence[Target]:
    (first,), seconds = _times(samples, "first"), _times(samples, "second")
    least = map(sum, zip(_times(samples, "fork"), _times(samples, "program"), strict=True))
    share = median(seconds) / median(least)
    return [
        Target("first run / second run", first / median(seconds), "≥", 49, "start"),
        Target("second run / (fork + request + the program's start)", share, "≤", 1.5, "start"),
    ]


def plots(samples: Samples) -> Sequence[Plot]:
    points = ((what, tuple(_times(samples, what))) for what in PARTS)
    series = Series("until the first good answer", tuple(points))
    return [Plot("start", "One web application, run twice", "", "ms (log)", (series,), True, False)]


def wrong(samples: Samples) -> str | None:
    """Runs must have started where they should."""
    tiers = {(row.what, row.tier) for row in samples["start"] if row.what in ("first", "second")}
    return None if tiers == {("first", 0), ("second", 2)} else f"runs began elsewhere: {tiers}"


BENCH = Bench(
    name="start",
    title="Images that are run twice",
    iterations=9,
    rows={"start": Took, "start-stages": StageOfRun},
    measure=measure,
    tables=tables,
    targets=targets,
    plots=plots,
    wrong=wrong,
)
