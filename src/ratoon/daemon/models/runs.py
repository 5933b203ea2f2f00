"""Images that are run, and the starts that are kept of that: requests."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ratoon.api.defaults import DISK_MIB, RAM_MIB
from ratoon.daemon.models.common import Request, Word
from ratoon.daemon.models.sandboxes import ForkOptions, PublishRequest
from ratoon.engine.sandbox.options import Seconds
from ratoon.engine.startup.spec import Health


class RunRequest(ForkOptions):
    """`command` takes the place of the image's own, after its entrypoint.

    An `entrypoint` takes the place of the image's, and of its command; an empty one is none. The
    command is process 1, as in a container; with `init` that is the agent, which reaps orphans.
    With `health` the answer comes once the command has passed that, and what there is then is kept
    for the next equal request. Without, the command is only started, or, if `start` is false, left
    to the client. `cache` false: nothing that was kept is used, and nothing is kept. `refresh`: the
    image is looked up again, and what was kept of this is made anew. `network` null is `none`.
    `cpu`: as in a request for a snapshot.
    """

    image: Annotated[Word, Field(min_length=1, max_length=4096)]
    command: list[Word] = Field(default_factory=list, max_length=4096)
    entrypoint: Annotated[list[Word], Field(max_length=4096)] | None = None
    init: bool = False
    ram_mib: Annotated[int, Field(ge=128, le=1 << 20)] = RAM_MIB
    vcpus: Annotated[int, Field(ge=1, le=64)] = 1
    disk_mib: Annotated[int, Field(ge=256, le=1 << 24)] = DISK_MIB
    cpu: Word | None = None
    health: Annotated[Health, Field(discriminator="kind")] | None = None
    publish: list[PublishRequest] = Field(default_factory=list, max_length=64)
    start: bool = True
    cache: bool = True
    refresh: bool = False


class PruneRequest(Request):
    """Besides what no run can use: what was not used for so long, or `everything`.

    `dry_run`: tell what would go.
    """

    older_than_seconds: Seconds | None = None
    everything: bool = False
    dry_run: bool = False
