"""What holds a sandbox's machine: a network namespace, control groups, a limit for its files."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from ratoon.machine.host import cgroups
from ratoon.machine.host.cgroups import Cgroup, Cgroups
from ratoon.machine.host.limits import Limits
from ratoon.machine.network.namespaces import Namespace, Namespaces
from ratoon.machine.network.policy import NetworkPolicy


@dataclass(frozen=True)
class Confinement:
    """Where one machine runs. `namespace` is to be released once the machine is gone."""

    namespace: Namespace
    cgroup: Cgroup | None
    file_limit: int | None


class Confiner:
    """Makes what machines are held by."""

    def __init__(self, namespaces: Namespaces, groups: Cgroups) -> None:
        self._namespaces = namespaces
        self._groups = groups

    async def confine(self, directory: Path, network: NetworkPolicy, limits: Limits) -> Confinement:
        """For a machine of the sandbox in `directory`.

        The control groups stay with the directory, see `SandboxDirectory.remove_cgroups`.
        HostError: this host cannot do that.
        """
        namespace = await self._namespaces.acquire(network)
        try:
            cgroup = await asyncio.to_thread(self.group, directory, limits)
        except BaseException:
            await namespace.release()
            raise
        return Confinement(namespace, cgroup, limits.disk_bytes)

    def group(self, directory: Path, limits: Limits) -> Cgroup | None:
        """The sandbox's control groups: those it has, or new ones; None without limits. Blocks."""
        return cgroups.find(directory, limits) or self._groups.create(directory, limits)
