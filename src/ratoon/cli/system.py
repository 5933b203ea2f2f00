"""`ratoon doctor`: can this host run sandboxes, and how well?"""

from __future__ import annotations

import asyncio
import getpass
import os
import tempfile
import textwrap
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ratoon import paths
from ratoon.artifacts import run as run_program
from ratoon.cli.app import Json, app, enter_user_namespace, print_json, run, say
from ratoon.cli.guest_checks import accelerator_at_a_glance, guest_checks, jail_check
from ratoon.cli.jail import try_jail
from ratoon.cli.screen import answers
from ratoon.engine.sources.disk import make_empty_disk
from ratoon.errors import HostError
from ratoon.jail.user_namespace import free_ids, way_to_lend
from ratoon.machine.host import checks, programs
from ratoon.machine.host.admission import Cost, Reserve
from ratoon.machine.host.cgroups import Cgroups
from ratoon.machine.host.checks import Check
from ratoon.machine.host.figures import meminfo, read_figures
from ratoon.machine.host.hierarchies import hierarchies
from ratoon.machine.network import fitness, pasta
from ratoon.machine.network.nameserver import RESOLV_CONF, first_resolver
from ratoon.machine.vmm import command
from ratoon.machine.vmm.qemu import qemu_version
from ratoon.store.memory.dirty import scan_supported
from ratoon.store.memory.reflink import can_reflink

COLOURS = {"ok": "green", "warn": "yellow", "bad": "red"}
#: Columns of the state and the name.
INDENT = 18
#: They are there if control groups are of version 2 alone, and where systemd runs.
_UNIFIED, _SYSTEMD = Path("/sys/fs/cgroup/cgroup.controllers"), Path("/run/systemd/system")
PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")

Quick = Annotated[bool, typer.Option("--quick", help="Without booting a guest: takes a second.")]
Attack = Annotated[
    bool,
    typer.Option("--attack", help="Try the jail instead: what would a broken QEMU get here?"),
]


@app.command("doctor")
def doctor(as_json: Json = False, quick: Quick = False, attack: Attack = False) -> None:
    """Check this host: what works, what does not, and what to do about it.

    Exit code 1 if sandboxes cannot run here. With `--attack`, a program takes QEMU's place in its
    jail and tries some four hundred things; exit code 1 if it gets what it should not.
    """
    if attack:
        enter_user_namespace()
        try_jail(as_json)
    user = getpass.getuser() if os.geteuid() else None
    found = run(_examine(user, _user_check(user), quick, show=not as_json))
    if as_json:
        print_json([asdict(check) for check in found])
    raise typer.Exit(1 if any(check.state == "bad" for check in found) else 0)


def _user_check(user: str | None) -> Check:
    """Who is not `user` but root, or becomes it in a namespace, for whatever else is checked."""
    if user is None:
        return checks.check_user(None, 0)
    lacking = checks.lacking_for_ids(way_to_lend(os.getuid()))
    try:
        enter_user_namespace()
    except HostError as error:
        return checks.check_user(user, 0, lacking, str(error))
    return checks.check_user(user, len(free_ids()), lacking)


async def _examine(user: str | None, who: Check, quick: bool, *, show: bool) -> list[Check]:
    """All checks, each shown as soon as it is known."""
    found = []
    async for check in _checks(user, who, quick):
        found.append(check)
        if show:
            answers.print(drawn(check, answers.width), soft_wrap=True)
    return found


async def _checks(user: str | None, who: Check, quick: bool) -> AsyncIterator[Check]:
    bad = False
    for check in await asyncio.to_thread(lambda: [who, *_host_checks(user)]):
        bad = bad or check.state == "bad"
        yield check
    if not bad:
        yield await asyncio.to_thread(checks.check_images, make_empty_disk)
        yield await jail_check()
    if quick:
        yield accelerator_at_a_glance()
    elif bad:
        say("no guest is tried: see what is bad")
    else:
        async for check in guest_checks(say):
            yield check


def _host_checks(user: str | None) -> Iterator[Check]:
    groups = hierarchies()
    home = paths.home()
    existing = next(each for each in (home, *home.parents) if each.exists())
    figures = read_figures(existing, groups)
    cost = Cost.from_environment()
    yield checks.check_programs()
    yield checks.check_qemu(_qemu_help, qemu_version)
    yield checks.check_directory("home", home, can_reflink)
    yield checks.check_directory("cache", paths.cache(), with_programs=True)
    yield checks.check_memory(figures, cost, Reserve.of(figures))
    yield checks.check_swap(meminfo())
    yield checks.check_counts(figures, cost)
    yield checks.check_dirty_pages(scan_supported, _ptrace_scope())
    with tempfile.TemporaryDirectory(prefix="ratoon-doctor-") as name:
        way = checks.way_to_limits(user, unified=_UNIFIED.exists(), systemd=_SYSTEMD.exists())
        yield checks.check_limits(Cgroups("doctor", groups).create, Path(name), way)
    firewall, resolver = fitness.firewall_trouble(), fitness.resolver_trouble()
    command = _command_for_networks(user) if firewall else None
    yield checks.check_network(firewall, resolver, str(_nameserver()), command)


def drawn(check: Check, width: int) -> Text:
    """One check as lines of at most `width` columns; what to do comes below it, then details."""
    # At spaces alone: who copies a command has its options whole.
    wrapped = partial(textwrap.wrap, width=max(width - INDENT, 20), break_on_hyphens=False)
    body = wrapped(check.found)
    if check.todo:
        body += wrapped(check.todo, initial_indent="→ ", subsequent_indent="  ")
    lines = Text(f"{check.state:<5}", style=COLOURS[check.state])
    lines.append(f"{check.name:<{INDENT - 5}}" + f"\n{'':{INDENT}}".join(body), style="default")
    for line in wrapped(check.details):
        lines.append(f"\n{'':{INDENT}}{line}", style="dim")
    return lines


def _qemu_help(option: str) -> str:
    return run_program([command.BINARY, option, "help"]).decode(errors="replace")


def _ptrace_scope() -> int:
    """kernel.yama.ptrace_scope, 0 on kernels without it."""
    try:
        return int(PTRACE_SCOPE.read_text())
    except FileNotFoundError:
        return 0


def _command_for_networks(user: str | None) -> str | None:
    """What root runs so that they are to be had; None: that is not known."""
    of_users = ["pasta"] if user else []
    missing = programs.missing(packages=[*programs.PACKAGES_OF_NETWORKS, *of_users])
    install = programs.command_for(missing, programs.release()) if missing else None
    return " && ".join(filter(None, [install, pasta.remedy() if user else None])) or None


def _nameserver() -> object:
    try:
        return first_resolver(RESOLV_CONF.read_text())
    except OSError:
        return None
