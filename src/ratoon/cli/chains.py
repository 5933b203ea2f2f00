"""The verbs about how the snapshots of a store relate: their tree, what they take, comparing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ratoon import paths
from ratoon.api.snapshots import LineageNode
from ratoon.cli.app import Json, app, print_json, say
from ratoon.cli.screen import answers, columns, show
from ratoon.cli.showing import printable
from ratoon.store.disk.tree import FileChanges
from ratoon.store.snapshot.diff import Difference, diff
from ratoon.store.snapshot.lineage import lineage
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.usage import StoreUsage, Usage, snapshot_usage, usage
from ratoon.units import MIB, format_mib


@app.command("tree")
def tree(as_json: Json = False) -> None:
    """Show which snapshot was made from which."""
    nodes = lineage(Store.open(paths.home()))
    if as_json:
        print_json([asdict(node) for node in nodes])
        return
    for line in draw(nodes):
        answers.print(line, highlight=False, markup=False, soft_wrap=True)


def draw(nodes: Iterable[LineageNode]) -> Iterator[str]:
    """One line for each node, which come as `lineage` gives them."""
    #: For each level, how many are still to come.
    left: list[int] = []
    for node in nodes:
        del left[node.level :]
        lines = ["│  " if count else "   " for count in left[:-1]]
        if left:
            left[-1] -= 1
            lines.append("├─ " if left[-1] else "└─ ")
        left.append(len(node.children))
        note = f"  ({printable(node.note)})" if node.note else ""
        yield f"{''.join(lines)}{node.tag}{note}"


@app.command("du")
def disk_usage(
    tag: Annotated[
        str | None, typer.Argument(help="One snapshot; all of the store if none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what snapshots, images, sandboxes and named volumes take on the disk.

    OWN would become free if this alone were deleted (a snapshot takes its image with it, unless
    another has the same memory), SHARED is what others hold as well. Each inode and each shared
    extent counts once, holes count nothing; so the total is less than the sum of the rows.
    """
    store = Store.open(paths.home())
    if tag is not None:
        one = snapshot_usage(store, tag)
        if as_json:
            print_json(_sizes(one))
        else:
            _show_usage([("snapshot", tag, one)])
        return
    whole = usage(store)
    if as_json:
        print_json(_all_sizes(whole))
        return
    rows = [("snapshot", name, each) for name, each in whole.snapshots.items()]
    rows += [("image", f"{name[:16]}…", each) for name, each in whole.images.items()]
    rows += [("sandbox", name, each) for name, each in whole.sandboxes.items()]
    rows += [("volume", name, each) for name, each in whole.volumes.items()]
    _show_usage([*rows, ("other", "", whole.other)])
    answers.print(f"total {format_mib(whole.total)}", highlight=False)


@app.command("diff")
def compare(
    left: Annotated[str, typer.Argument(metavar="A", help="The snapshot to compare from.")],
    right: Annotated[str, typer.Argument(metavar="B", help="The snapshot to compare to.")],
    as_json: Json = False,
) -> None:
    """Show what differs between two snapshots, in memory, on the disk and of files.

    A branch takes the disk as it is, without waiting for the guest to write back its page cache: a
    file that was written just before may still be in the snapshot's memory alone, and does not show
    here. Run `sync` in the sandbox before the branch where that matters.

    Files: + added, - removed, ~ changed, with what of it. Content is read where the size is equal
    and the times are not.
    """
    # As Ctrl-C does, it must take the temporary files away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    difference = diff(Store.open(paths.home()), left, right, say)
    if as_json:
        print_json(_difference(difference))
        return
    answers.print(
        f"{difference.changed_pages} of {difference.ram_pages} pages, "
        f"{difference.changed_disk_bytes / MIB:.1f} of {difference.disk_bytes / MIB:.0f} MiB "
        "of disk differ",
        highlight=False,
    )
    if difference.files is None:
        say(f"no files compared: {difference.no_files}")
        return
    for line in _file_lines(difference.files):
        answers.print(line, highlight=False, markup=False, soft_wrap=True)


def _file_lines(files: FileChanges) -> Iterator[str]:
    lines = [
        *((path, f"+ {_shown(path)}") for path in files.added),
        *((path, f"- {_shown(path)}") for path in files.removed),
        *(
            (each.path, f"~ {_shown(each.path)}  ({', '.join(each.what)})")
            for each in files.changed
        ),
    ]
    return (line for _, line in sorted(lines))


def _shown(path: bytes) -> str:
    return f"/{printable(os.fsdecode(path))}"


def _difference(difference: Difference) -> dict[str, Any]:
    files = difference.files
    listed = files and {
        "added": [f"/{os.fsdecode(path)}" for path in files.added],
        "removed": [f"/{os.fsdecode(path)}" for path in files.removed],
        "changed": [
            {"path": f"/{os.fsdecode(each.path)}", "what": list(each.what)}
            for each in files.changed
        ],
    }
    return {**asdict(difference), "files": listed}


def _sizes(one: Usage) -> dict[str, int]:
    return {"own_bytes": one.own, "shared_bytes": one.shared, "total_bytes": one.total}


def _all_sizes(whole: StoreUsage) -> dict[str, Any]:
    return {
        "total_bytes": whole.total,
        "snapshots": {name: _sizes(each) for name, each in whole.snapshots.items()},
        "images": {name: _sizes(each) for name, each in whole.images.items()},
        "sandboxes": {name: _sizes(each) for name, each in whole.sandboxes.items()},
        "volumes": {name: _sizes(each) for name, each in whole.volumes.items()},
        "other": _sizes(whole.other),
    }


def _show_usage(rows: Iterable[tuple[str, str, Usage]]) -> None:
    table = columns("WHAT", "NAME")
    for name in ("OWN", "SHARED", "TOTAL"):
        table.add_column(f"{name} MiB", justify="right")
    for what, name, one in rows:
        sizes = (one.own, one.shared, one.total)
        table.add_row(what, name, *(f"{size / MIB:.1f}" for size in sizes))
    show(table)
