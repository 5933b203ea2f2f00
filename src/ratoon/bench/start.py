"""The same web application started twice: until its first good answer, by stages.

::

    python -m ratoon.bench.start [--rounds N]

Django from PyPI, in an image made here, started by `ratoon run` as its user would, on a port of
the host. The second start is measured some times, beside what it cannot do without: a fork of the
same snapshot with one request to it, and the command line's own start.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

from ratoon.bench.machine import describe_machine

ROUNDS = 7
#: How much sooner the second start must be, and what it may take of what it cannot do without.
SOONER, SHARE = 49, 1.5
PROGRAM = Path(sys.executable).with_name("ratoon")
APPLICATION = """
import django, sys
from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpResponse
from django.urls import path
settings.configure(DEBUG=False, ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="bench",
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions",
        "django.contrib.messages"], MIDDLEWARE=["django.middleware.common.CommonMiddleware"])
urlpatterns = [path("", lambda request: HttpResponse("up\\n"))]
execute_from_command_line(["app", "runserver", "--noreload", "--nothreading", "127.0.0.1:8000"])
"""


def make_image(tree: Path) -> None:
    """A Debian with Python, and the application with what it needs from PyPI."""
    include = "--include=python3,python3-sqlparse"
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", include, "bookworm", tree], check=True
    )
    target = tree / "opt/app"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "--target", target, "django>=4.2,<5"], check=True)
    (target / "app.py").write_text(APPLICATION)


def ratoon(*arguments: str | Path) -> str:
    done = subprocess.run([PROGRAM, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def answers(port: int) -> None:
    """Wait for the first good answer."""
    deadline = time.monotonic() + 600
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
                assert answer.read() == b"up\n"
            return
        except OSError:
            if time.monotonic() > deadline:
                raise


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def start(image: str) -> tuple[float, dict[str, Any]]:
    """Milliseconds from the command to the first good answer, and what the command told."""
    port = free_port()
    began = time.perf_counter()
    told = ratoon(
        *("run", "-d", "--json", "--health", "http://:8000/", "-p", f"{port}:8000"),
        *("-e", "PYTHONDONTWRITEBYTECODE=1", image),
        *("--", "python3", "/opt/app/app.py"),
    )
    answers(port)
    took = (time.perf_counter() - began) * 1e3
    sandbox: dict[str, Any] = json.loads(told)
    ratoon("kill", sandbox["id"])
    return took, sandbox["run"] | {"tag": sandbox["snapshot_tag"]}


def least(tag: str) -> float:
    """Milliseconds of what a start cannot do without: a fork of `tag`, one request to it."""
    from ratoon import Client

    port = free_port()
    with Client() as client:
        client.version()
        began = time.perf_counter()
        (sandbox,) = client.fork(tag, publish={8000: port})
        answers(port)
        took = (time.perf_counter() - began) * 1e3
        sandbox.kill()  # type: ignore[union-attr]
    return took


def timed_version() -> float:
    began = time.perf_counter()
    ratoon("--version")
    return (time.perf_counter() - began) * 1e3


def main() -> int:
    """Measure; the exit code is 1 if a ratio is out of its limit."""
    parser = argparse.ArgumentParser(prog="python -m ratoon.bench.start", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="ratoon-start-") as name:
        place = Path(name)
        os.environ |= {"RATOON_HOME": str(place / "home"), "RATOON_RUNTIME": str(place / "run")}
        os.environ.pop("RATOON_URL", None)
        make_image(place / "tree")
        daemon = subprocess.Popen(
            [PROGRAM, "serve", "--stop-sandboxes"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not (place / "run/daemon.sock").exists():
                time.sleep(0.1)
            return measure(f"dir:{place / 'tree'}", rounds)
        finally:
            daemon.terminate()
            daemon.wait()


def measure(image: str, rounds: int) -> int:
    first, told = start(image)
    print(f"first start {first:.0f} ms, from tier {told['tier']}: {told['stages_ms']}")
    start(image)
    seconds, leasts = [], []
    for _ in range(rounds):
        took, told = start(image)
        assert told["tier"] == 2, told
        seconds.append(took)
        leasts.append(least(told["tag"]) + timed_version())
    second, floor = median(seconds), median(leasts)
    print(f"second start {second:.0f} ms, from tier 2: {told['stages_ms']}; all: {seconds}")
    print(f"fork + one request + the command line's own start: {floor:.0f} ms; all: {leasts}")
    print(f"first / second: {first / second:.1f} (at least {SOONER})")
    print(f"second / what it cannot do without: {second / floor:.2f} (at most {SHARE})")
    return int(first < SOONER * second or second > SHARE * floor)


if __name__ == "__main__":
    sys.exit(main())
