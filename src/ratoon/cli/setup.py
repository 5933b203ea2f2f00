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
    from ratoon.machine.guest.build import build_guest
    from ratoon.machine.host import programs

    missing = programs.missing()
    if missing:
        command = programs.command_for(missing, programs.release())
        say(f"missing: {', '.join(missing)}")
        if command is None:
            raise HostError("which packages of this distribution have these is not known")
        if not yes:
            print(command)
            say("that is for root to run; `ratoon setup --yes` runs it, by sudo if need be")
            raise typer.Exit(1)
        as_root = [] if os.geteuid() == 0 else ["sudo"]
        if subprocess.run([*as_root, "sh", "-c", command], check=False).returncode:
            raise HostError(f"that failed: {command}")
    guest = build_guest(say)
    say(f"nothing is missing, and guests have what they boot from: {guest.kernel.parent}")
    say("`ratoon doctor` tries it; `ratoon run debian -- echo hello` is a first command")
