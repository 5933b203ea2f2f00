"""Bases over HTTP, of a kernel and a raw disk that are given by name."""

from __future__ import annotations

import asyncio
from pathlib import Path

from served_daemon import serving

from ratoon.artifacts import run
from ratoon.daemon.settings import Settings
from ratoon.engine.sandbox.engine import Engine
from ratoon.machine.guest.build import build_guest


async def test_a_kernel_and_a_disk_become_a_base(engine: Engine, tmp_path: Path) -> None:
    guest = await asyncio.to_thread(build_guest)
    tree, disk = tmp_path / "tree", tmp_path / "disk.raw"
    tree.mkdir()
    (tree / "note").write_text("from a disk of its own\n")
    disk.write_bytes(b"")
    with disk.open("ab") as file:
        file.truncate(64 << 20)
    await asyncio.to_thread(run, ["mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, disk])
    settings = Settings(image_roots=(tmp_path, guest.kernel.parent))
    async with serving(engine, tmp_path / "run", settings) as served:
        body = {"tag": "given", "kernel": str(guest.kernel), "rootfs": str(disk), "tap": None}
        made = await served.api.post("/v1/snapshots", json=body)
        assert made.status_code == 201, made.text
        disk.unlink()
        (sandbox,) = await served.fork(snapshot_tag="given")
        path = f"/v1/sandboxes/{sandbox}"
        found = await served.api.get(f"{path}/files", params={"path": "/note"})
        assert found.text == "from a disk of its own\n"
        code = await served.api.post(f"{path}/eval", json={"code": "1"})
        assert (code.status_code, code.json()["kind"]) == (409, "NoPython")
        await served.api.delete(path)
        again = await served.api.post("/v1/snapshots", json=body)
        assert again.status_code == 400
        for field in ("kernel", "rootfs"):
            outside = {**body, "tag": "other", "rootfs": str(guest.kernel), field: "/etc/passwd"}
            refused = await served.api.post("/v1/snapshots", json=outside)
            assert refused.status_code == 400
            assert "/etc/passwd" in refused.json()["error"]
    assert not [*engine.store.staging.iterdir()]


async def test_a_pack_is_carried_to_another_name(engine: Engine, tmp_path: Path) -> None:
    async with serving(engine, tmp_path / "run", Settings()) as served:
        api = served.api
        packed = (await api.get("/v1/snapshots/base/pack")).content
        refused = await api.post("/v1/unpack", content=packed)
        assert (refused.status_code, refused.json()["kind"]) == (409, "AlreadyExists")
        made = await api.post("/v1/unpack", params={"tag": "copy"}, content=packed)
        assert made.status_code == 201, made.text
        assert made.json()["snapshot"]["tag"] == "copy"
        assert made.json()["stored_bytes"] == 0
        again = await api.post("/v1/unpack?tag=copy&force=true", content=packed)
        assert again.status_code == 201
        (sandbox,) = await served.fork(snapshot_tag="copy")
        await api.delete(f"/v1/sandboxes/{sandbox}")
        for content, status in ((b"", 409), (b"no pack", 409), (packed[:-9], 409)):
            answer = await api.post("/v1/unpack?tag=other", content=content)
            assert answer.status_code == status, answer.text
        assert (await api.get("/v1/snapshots/absent/pack")).status_code == 404
    assert not [*engine.store.staging.iterdir()]
