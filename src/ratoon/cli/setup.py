"""`ratoon setup`: what this host lacks, and how to come by it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from ratoon.cli.app import Json, app, print_json, say
from ratoon.errors import HostError, InvalidInput

Yes = Annotated[
    bool, typer.Option("--yes", "-y", help="Run the command, as root or by sudo, and not show it.")
]
DownloadOnly = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Only fetch what guests are built of, for a host without network."
    ),
]
From = Annotated[
    Path | None,
    typer.Option("--from", metavar="DIR", help="Build guests of what is in DIR; fetch nothing."),
]


@app.command("setup")
def setup(
    yes: Yes = False,
    download_only: DownloadOnly = None,
    source: From = None,
    as_json: Json = False,
) -> None:
    """Say what this host lacks and which command brings it.

    If nothing is missing, what guests boot from is built, if it is not there yet. Exit code 1 if
    something is.
    """
    # Here, so that no other verb waits for it.
    from ratoon.machine.guest.build import build_guest

    if download_only:
        if source or yes:
            raise InvalidInput("--download-only only downloads: without --from and --yes")
        _download(download_only, as_json)
        return
    needed, useful = _lacking()
    command = _command_for(needed, useful)
    if command and yes:
        try:
            _run_as_root(command)
        except HostError as error:
            if needed:
                raise
            say(str(error))  # without it something is not to be had, and all else is
        needed, command = _lacking()[0], None
        if needed:
            raise HostError(f"still missing: {', '.join(needed)}")
    if command:
        if not as_json:
            print(command)
        say("that is for root to run; `ratoon setup --yes` runs it, by sudo if need be")
    guest = None if needed else build_guest(say, source)
    if as_json:
        files = guest and {"kernel": str(guest.kernel), "initramfs": str(guest.initramfs)}
        print_json({"missing": needed, "command": command, "guest": files})
    if guest is None:
        raise typer.Exit(1)
    say(f"guests have what they boot from: {guest.kernel.parent}")
    say("next: `ratoon doctor` tries it; `ratoon run debian -- echo hello` is a first command")


def _lacking() -> tuple[list[str], list[str]]:
    """Programs that nothing works without, and those that something does.

    What is too old counts, if the distribution has a later one. HostError: QEMU is, and it has not.
    """
    from ratoon.jail.user_namespace import is_root_of_all
    from ratoon.machine.host import programs

    needed = programs.missing()
    useful = programs.missing(packages=programs.PACKAGES_OF_IMAGES | programs.PACKAGES_OF_NETWORKS)
    if not is_root_of_all():
        useful += programs.missing(packages=programs.PACKAGES_OF_USERS)
    newer = programs.has_newer(programs.release())
    for name, trouble in programs.outdated().items():
        of_some_use = name == "mke2fs"
        if newer:
            (useful if of_some_use else needed).append(name)
        elif not of_some_use:
            raise HostError(f"{trouble}, and this distribution has none")
    return needed, useful


def _command_for(needed: list[str], useful: list[str]) -> str | None:
    """What root is to run; None: there is nothing to be had. HostError: and yet it is needed."""
    from ratoon.machine.host import programs

    if not needed and not useful:
        return None
    say(f"missing: {', '.join([*needed, *(f'{name} (may be missing)' for name in useful)])}")
    command = programs.command_for([*needed, *useful], programs.release())
    if command is None and needed:
        raise HostError("which packages of this distribution have these is not known")
    return command


def _run_as_root(command: str) -> None:
    as_root = [] if os.geteuid() == 0 else ["sudo"]
    script = f"export DEBIAN_FRONTEND=noninteractive; {command}"
    try:
        done = subprocess.run([*as_root, "sh", "-c", script], check=False)
    except FileNotFoundError:
        raise HostError(f"there is no sudo here; have root run: {command}") from None
    if done.returncode:
        raise HostError(f"that failed: {command}")


def _download(directory: Path, as_json: bool) -> None:
    from ratoon.machine.guest import packages

    lock = packages.locked()
    packages.download(lock, directory, say)
    if as_json:
        print_json({"directory": str(directory), "files": [each.file for each in lock.packages]})
    say(f"a host with the same Ratoon builds guests of it: `ratoon setup --from {directory}`")
