"""The verbs that show snapshots: those of the store here, or of a daemon that was named."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ratoon.cli.app import Json, app, print_json, run
from ratoon.cli.connect import Token, Url, ask, is_named
from ratoon.cli.showing import print_fields
from ratoon.units import MIB, format_mib

if TYPE_CHECKING:
    from ratoon.client.aio.client import AsyncClient


@app.command("images")
def images(as_json: Json = False, daemon_url: Url = None, daemon_token: Token = None) -> None:
    """List the snapshots."""
    if is_named(daemon_url):
        entries = run(ask(daemon_url, daemon_token, _images_of_daemon))
    else:
        entries = _images_of_store()
    if as_json:
        print_json(entries)
    else:
        _show_images(entries)


async def _images_of_daemon(client: AsyncClient) -> list[dict[str, Any]]:
    return [_without_none(asdict(each)) for each in await client.snapshots.list()]


def _images_of_store() -> list[dict[str, Any]]:
    from ratoon import paths
    from ratoon.machine.vmm.cpu import describe
    from ratoon.store.snapshot.snapshot import Snapshot
    from ratoon.store.snapshot.store import Store

    entries: list[dict[str, Any]] = []
    for entry in Store.open(paths.home()).list():
        if not isinstance(entry, Snapshot):
            entries.append({"tag": entry.tag, "error": str(entry.error)})
            continue
        manifest = entry.manifest
        memory = manifest.layers[-1].memory
        entries.append(
            {
                "tag": manifest.tag,
                "dir": str(entry.path),
                "created_at_unix": int(manifest.created_at_unix),
                "parent_tag": manifest.parent.tag if manifest.parent else None,
                "chain_depth": entry.depth,
                "memory_root": manifest.memory_root,
                "ram_bytes": manifest.machine.ram_bytes,
                "accelerator": manifest.machine.accelerator,
                "cpu": describe(manifest.machine.cpu),
                "pages": memory.entries,
                "layer_bytes": memory.size,
                "warning": manifest.warning,
            }
        )
    return entries


def _show_images(entries: list[dict[str, Any]]) -> None:
    from ratoon.cli.screen import columns, show

    table = columns("TAG", "PARENT", "DEPTH", "RAM", "LAYER", "ACCELERATOR", "CREATED")
    for entry in entries:
        if entry.get("ram_bytes") is None:
            what = "being written" if entry.get("status") == "writing" else "damaged"
            table.add_row(entry["tag"], f"{what}: see `ratoon snapshot-info`", style="red")
            continue
        table.add_row(
            entry["tag"],
            entry.get("parent_tag") or "-",
            str(entry["chain_depth"]),
            f"{entry['ram_bytes'] // MIB} MiB",
            format_mib(entry["layer_bytes"]),
            entry["accelerator"],
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["created_at_unix"])),
        )
    show(table)


@app.command("snapshot-info")
def snapshot_info(
    tag: str, as_json: Json = False, daemon_url: Url = None, daemon_token: Token = None
) -> None:
    """Show all about one snapshot."""

    async def of_daemon(client: AsyncClient) -> dict[str, Any]:
        return asdict(await client.snapshots.info(tag))

    if is_named(daemon_url):
        detail = run(ask(daemon_url, daemon_token, of_daemon))
    else:
        detail = _detail_of_store(tag)
    if as_json:
        print_json(_without_none(detail))
        return
    print_fields(detail)


def _detail_of_store(tag: str) -> dict[str, Any]:
    from ratoon import paths
    from ratoon.store.snapshot.store import Store
    from ratoon.store.snapshot.usage import snapshot_usage

    store = Store.open(paths.home())
    detail = asdict(store.info(tag))
    used = snapshot_usage(store, tag)
    return detail | {
        "own_bytes": used.own,
        "shared_bytes": used.shared,
        "total_bytes": used.total,
    }


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
