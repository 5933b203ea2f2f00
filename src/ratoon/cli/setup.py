"""`ratoon setup`: what this host lacks, and how to come by it."""

from __future__ import annotations

import os
import subprocess
from typing import Annotated

import typer

from ratoon.cli.app import app, say
from ratoon.errors import HostError

Yes = Annotated[
    bool, typer.Option("--yes", "-y", help="Run the command, as root or by sudo, and not show it.")
]


@app.command("setup")
def setup(yes: Yes = False) -> None:
    """Say what this host lacks and which command brings it.

    If nothing is missing, what guests boot from is built, if it is not there yet. Exit code 1 if
    something is.
    """
    # Here, so that no other verb waits for it.
    from ratoon.jail.user_namespace import is_root_of_all
    from ratoon.machine.guest.build import build_guest
    from ratoon.machine.host import programs

    missing = programs.missing()
    useful = [] if is_root_of_all() else programs.missing(packages=programs.PACKAGES_OF_USERS)
    if missing or useful:
        command = programs.command_for([*missing, *useful], programs.release())
        say(f"missing: {', '.join([*missing, *(f'{name} (may be missing)' for name in useful)])}")
        if command is None:
            if missing:
                raise HostError("which packages of this distribution have these is not known")
        elif yes:
            _run_as_root(command)
        else:
            print(command)
            say("that is for root to run; `ratoon setup --yes` runs it, by sudo if need be")
            if missing:
                raise typer.Exit(1)
    guest = build_guest(say)
    say(f"guests have what they boot from: {guest.kernel.parent}")
    say("`ratoon doctor` tries it; `ratoon run debian -- echo hello` is a first command")


def _run_as_root(command: str) -> None:
    as_root = [] if os.geteuid() == 0 else ["sudo"]
    script = f"export DEBIAN_FRONTEND=noninteractive; {command}"
    try:
        done = subprocess.run([*as_root, "sh", "-c", script], check=False)
    except FileNotFoundError:
        raise HostError(f"there is no sudo here; have root run: {command}") from None
    if done.returncode:
        raise HostError(f"that failed: {command}")
