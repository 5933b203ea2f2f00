"""`ratoon check`: is everything in the store what it was, and what can be done where it is not."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ratoon import paths
from ratoon.cli.app import Json, app, print_json
from ratoon.cli.screen import answers, notes
from ratoon.engine.sandbox.sweep import sweep
from ratoon.errors import InvalidInput
from ratoon.store.check.check import check_store
from ratoon.store.check.findings import Finding, Report, Severity
from ratoon.store.check.repair import Outcome, Repair, plan_repairs, repair_store
from ratoon.store.check.scrub import EVERYTHING, Slice
from ratoon.store.snapshot.progress import ByteProgress
from ratoon.store.snapshot.store import Store
from ratoon.units import format_mib

#: Findings about one file that are shown one by one.
_SHOWN = 10

_STYLES = {Severity.DAMAGE: "red", Severity.MINOR: "yellow", Severity.NOTE: "dim"}


@app.command("check")
def check(
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Read all pages, disks and images too.")
    ] = False,
    subset: Annotated[
        str | None, typer.Option(metavar="N/T", help="Of the data, read part N of T parts alone.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Do what is safe about the findings; asks first.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Repair without asking.")] = False,
    as_json: Json = False,
) -> None:
    """Check the store; exit code 0 if it is sound.

    Exit codes: 0 sound (notes, such as a deleted parent, do not count); 1 nothing is lost, but
    there is litter, something Ratoon does not know, a wrong mode, or a damaged cache (image,
    template); 5 a snapshot is damaged. With --repair, what is left afterwards counts.

    --repair removes litter that nobody holds and damaged images, which are made again, sets modes,
    and re-makes damaged files from copies and images that have the same digests. It touches nothing
    that matches.
    """
    if subset and not read_data:
        raise InvalidInput("--subset is a part of the data: give --read-data too")
    if yes and not repair:
        raise InvalidInput("--yes answers what --repair asks: give that too")
    if repair and not yes and not sys.stdin.isatty():
        raise InvalidInput("--repair asks first, and nobody is there to answer: give --yes")
    part = (Slice.parse(subset) if subset else EVERYTHING) if read_data else None
    store = Store(paths.home())
    report = _check(store, part)
    outcomes: list[Outcome] = []
    # A manifest that was restored may bring to light what else is damaged.
    while repair and (plan := _untried(report, outcomes)) and (yes or _agreed(report, plan)):
        outcomes += repair_store(
            store, plan, sweep_sandboxes=lambda: sweep(store, paths.runtime(store.home))
        )
        report = _check(store, part)
    if as_json:
        print_json(_as_dict(store, report, outcomes))
    else:
        _show(answers, report, outcomes)
    raise typer.Exit(report.exit_code)


def _untried(report: Report, outcomes: Sequence[Outcome]) -> tuple[Repair, ...]:
    tried = {outcome.repair.file for outcome in outcomes}
    return tuple(repair for repair in plan_repairs(report) if repair.file not in tried)


def _check(store: Store, part: Slice | None) -> Report:
    with _progress_bar() as progress:
        return check_store(store, read_data=part, progress=progress)


@contextmanager
def _progress_bar() -> Iterator[ByteProgress]:
    columns = (
        TextColumn("reading"),
        *(BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()),
    )
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("reading", visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        yield progress


def _agreed(report: Report, plan: Sequence[Repair]) -> bool:
    _show(notes, report)
    for repair in plan:
        _print(notes, f"{repair.file}: {repair.what}")
    return typer.confirm("Do this?", err=True)


def _show(console: Console, report: Report, outcomes: Sequence[Outcome] = ()) -> None:
    for outcome in outcomes:
        done = "repaired" if outcome.done else "not repaired"
        _print(console, f"{done}: {outcome.repair.file}: {outcome.why}")
    for _, group in groupby(report.findings, key=lambda found: (found.kind, found.file)):
        findings = list(group)
        style = _STYLES[findings[0].severity]
        for finding in findings[:_SHOWN]:
            _print(console, f"{_title(finding)}: {finding.what}", style)
        if len(findings) > _SHOWN:
            rest = f"  … and {len(findings) - _SHOWN} more like that in this file"
            _print(console, rest, style)
        _print(console, f"  {findings[0].way_out}", "dim")
    verdict = {0: "sound", 1: "nothing is lost, but not all is in order"}
    summary = f"{report.snapshots} snapshots, {report.images} images"
    if report.bytes_read:
        summary += f", {format_mib(report.bytes_read)} of data read"
    if report.in_use:
        summary += f"; {len(report.in_use)} things in use by others"
    _print(console, f"{summary}: {verdict.get(report.exit_code, 'DAMAGED')}")


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _title(finding: Finding) -> str:
    of = f"snapshot {finding.snapshot}, " if finding.snapshot else ""
    return f"{finding.kind.value}: {of}file {finding.file}"


def _as_dict(store: Store, report: Report, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "home": str(store.home),
        "sound": report.sound,
        "exit_code": report.exit_code,
        "snapshots": report.snapshots,
        "images": report.images,
        "bytes_read": report.bytes_read,
        "in_use": [str(path) for path in report.in_use],
        "findings": [_finding(finding) for finding in report.findings],
        "repairs": [
            {"file": str(outcome.repair.file), "done": outcome.done, "why": outcome.why}
            for outcome in outcomes
        ],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "class": finding.kind.value,
        "severity": finding.severity.value,
        "snapshot": finding.snapshot,
        "file": str(finding.file),
        "page": finding.page,
        "what": finding.what,
        "way_out": finding.way_out,
    }
