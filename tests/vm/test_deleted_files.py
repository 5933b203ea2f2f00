"""What was deleted from the disk is not in the next snapshot."""

from __future__ import annotations

import asyncio

import pytest
from vm_helpers import sh

from ratoon.engine.sandbox.engine import Engine

MARK = b"secret: 6f1d8a52"
BLOCK, BLOCKS = 4096, 2048
#: Each of its blocks begins with the mark.
WRITE = f"""
with open("/root/secret", "wb") as file:
    for _ in range({BLOCKS}):
        file.write({MARK!r}.ljust({BLOCK}, b"-"))
"""
#: What the kernel has discarded, in sectors, is told once it is done.
DELETE = f"""
rm /root/secret; sync
until [ $(awk '{{print $14}}' /sys/block/vda/stat) -ge {BLOCKS * BLOCK // 512 // 2} ]; do
    sleep 0.1
done
"""


@pytest.mark.parametrize("deleted", [False, True])
async def test_a_file_with_a_secret(engine: Engine, deleted: bool) -> None:
    async with await engine.fork_one("base") as sandbox:
        result = await sandbox.exec(["python3", "-c", WRITE])
        assert result.exit_code == 0, result
        await sh(sandbox, "sync")
        if deleted:
            await sh(sandbox, DELETE)
        await engine.branch(sandbox, "next")
    snapshot = engine.store.get("next")
    layer = await asyncio.to_thread(snapshot.disk_path(snapshot.depth).read_bytes)
    found = layer.count(MARK)
    if deleted:
        # What shares the first or the last cluster of an extent with something else may be there.
        assert found <= BLOCKS // 16
    else:
        assert found >= BLOCKS
