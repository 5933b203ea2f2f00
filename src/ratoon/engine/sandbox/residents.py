"""Which machines of a store run: what is to be known before anything else is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ratoon.machine.vmm.process import started_at


def processes(home: Path) -> Iterator[int]:
    """Their numbers, as written down by whoever started them; of those that have not ended.

    Next to nothing is imported for this: who enters a user namespace has one thread, and libraries
    start some.
    """
    for path in sorted(home.glob("sandboxes/*/state.json")):
        try:
            run = json.loads(path.read_bytes())["run"]
            if run is not None and started_at(run["pid"]) == run["started"]:
                yield run["pid"]
        except (OSError, ValueError, KeyError):
            continue
