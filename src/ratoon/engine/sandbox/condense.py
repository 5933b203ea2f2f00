"""The layers that a sandbox alone has become one, before they are too many.

A standby adds one each time, and so does a fork of a running sandbox. Whatever starts on them opens
each: with a hundred QEMU takes a second more, and a thousand are more files than it may open.
"""

from __future__ import annotations

import asyncio
import logging

from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.engine.sandbox.standing import stand_on_itself
from ratoon.errors import RatoonError
from ratoon.store.snapshot.compact import anonymous_layers, publish_condensed

log = logging.getLogger(__name__)

#: So many may lie on one another.
LIMIT = 16


async def squash_standby_layers(sandbox: Sandbox) -> None:
    """Merge the topmost layers of what the sandbox stands on, if nobody else has them.

    The caller holds `sandbox.changing`. If it fails they stay, until the next time.
    """
    parent = sandbox.parent
    if anonymous_layers(parent.manifest) <= LIMIT:
        return
    try:
        with sandbox.directory.stage() as staging:
            snapshot = await asyncio.to_thread(publish_condensed, parent, staging)
            stand_on_itself(sandbox, snapshot)
    except (RatoonError, OSError) as error:
        log.warning("the layers of sandbox %s were not merged: %s", sandbox.id, error)
