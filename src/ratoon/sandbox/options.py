"""What a sandbox is started with, besides its snapshot."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ratoon.host.limits import Limits
from ratoon.network.policy import NetworkPolicy

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SandboxOptions(BaseModel):
    """Chosen at the fork, and kept through standby and reset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: What its guest may reach; None: what its snapshot says.
    network: NetworkPolicy | None = None
    #: What it may use of its host.
    limits: Limits = Limits()
    #: It is killed this long after its fork; None: never.
    ttl_seconds: Seconds | None = None
    #: It goes to standby when it has not been used for so long, and wakes when it is; None: never.
    idle_seconds: Seconds | None = None
    #: A machine is kept started for its next reset, which is sooner then.
    spare: bool = False
    #: What its user wants to find it by.
    metadata: dict[str, str] = {}
