"""`ratoon doctor`: can this host run sandboxes, and how?"""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import asdict, dataclass

import typer
from rich.table import Table

from ratoon import paths
from ratoon.cli.app import Json, answers, app, print_json, run, say
from ratoon.errors import RatoonError
from ratoon.guest.build import build_guest
from ratoon.memory.dirty import scan_supported
from ratoon.sandbox.accelerator import choose_accelerator
from ratoon.vmm import command
from ratoon.vmm.qemu import qemu_version
from ratoon.vmm.tsc import host_tsc_khz

PROGRAMS = (command.BINARY, "qemu-img", "mmdebstrap", "mke2fs", "cpio", "dpkg-deb", "setpriv")


@dataclass(frozen=True)
class Check:
    """One line of the answer; a host where a check is not `good` cannot run sandboxes."""

    name: str
    good: bool
    what: str


@app.command("doctor")
def doctor(as_json: Json = False) -> None:
    """Check this host, and show which accelerator works. Exit code 1 if something is missing."""
    checks = [*_programs(), *_directories(), _scan(), _accelerator()]
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        for check in checks:
            table.add_row("[green]ok[/]" if check.good else "[red]bad[/]", check.name, check.what)
        answers.print(table)
    raise typer.Exit(0 if all(check.good for check in checks) else 1)


def _programs() -> list[Check]:
    checks = []
    for name in PROGRAMS:
        found = shutil.which(name)
        checks.append(Check(name, found is not None, found or "missing: run `make setup`"))
    return checks


def _directories() -> list[Check]:
    checks = []
    for name, path in (("home", paths.home()), ("cache", paths.cache())):
        existing = next(p for p in (path, *path.parents) if p.exists())
        writable = os.access(existing, os.W_OK)
        free = shutil.disk_usage(existing).free / 2**30
        what = f"{path}, {free:.0f} GiB free" if writable else f"{path} cannot be written"
        checks.append(Check(name, writable, what))
    return checks


def _scan() -> Check:
    how = "PAGEMAP_SCAN" if scan_supported() else "plain pagemap (Linux before 6.7)"
    return Check("dirty pages", True, how)


def _accelerator() -> Check:
    try:
        probe = run(choose_accelerator(build_guest(say), say))
        version, tsc = qemu_version(), host_tsc_khz()
    except (RatoonError, asyncio.CancelledError) as error:
        return Check("accelerator", False, str(error))
    what = f"{probe.accelerator} ({probe.reason}); QEMU {version}, TSC {tsc} kHz"
    return Check("accelerator", True, what)
