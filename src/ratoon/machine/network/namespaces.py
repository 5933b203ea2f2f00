"""The namespaces that an engine's machines run in: one for each policy that is in use.

A machine without network has an empty one of its own, from its cell. Any other policy has one with
an uplink, made when it is first asked for and removed with its last user. Sandboxes that share a
namespace do not meet in it: see `rules.inside`. Namespaces have no names, so the kernel frees those
of a killed engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ratoon.concurrency import in_thread, uncancelled
from ratoon.errors import HostError
from ratoon.machine.network import uplink
from ratoon.machine.network.netns import new_namespace
from ratoon.machine.network.policy import NONE, NetworkPolicy
from ratoon.machine.network.resolver import Resolver
from ratoon.machine.network.uplink import Uplink

log = logging.getLogger(__name__)


@dataclass
class _Shared:
    """A namespace and how many use it."""

    fd: int
    uplink: Uplink | None
    users: int = 0

    def close(self) -> None:
        if self.uplink:
            self.uplink.remove()
        os.close(self.fd)


class Namespace:
    """The use of one namespace by one machine. Release it once that machine is gone."""

    def __init__(
        self,
        namespaces: Namespaces,
        policy: NetworkPolicy,
        fd: int | None = None,
        resolver: Path | None = None,
    ) -> None:
        self._namespaces: Namespaces | None = namespaces
        self.policy = policy
        #: Its descriptor, and the file with its nameservers; None: it is the machine's own, empty.
        self.fd = fd
        self.resolver = resolver

    @property
    def restrict(self) -> bool:
        """Whether QEMU's own filter is to be closed as well."""
        return self.policy == NONE

    @property
    def uplink(self) -> str | None:
        """The name of its way out, if it has one; see `Namespaces.adopt`."""
        return self._namespaces._uplink(self.policy) if self._namespaces else None

    async def release(self) -> None:
        """Let it go; safe to repeat."""
        namespaces, self._namespaces = self._namespaces, None
        if namespaces:
            await namespaces._release(self.policy)


class Namespaces:
    """Gives machines their namespaces, within an `async with` block; all are gone after it.

    In `directory` is a file that they have mounted.
    """

    def __init__(self, directory: Path) -> None:
        self._resolver = Resolver(directory / "resolv.conf")
        #: Machines that use some live on.
        self._left = False
        self._shared: dict[NetworkPolicy, _Shared] = {}
        self._changing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Remove what a killed engine has left."""
        if os.geteuid() == 0:
            try:
                await asyncio.to_thread(uplink.sweep)
            except HostError as error:  # it matters to those alone who want an uplink
                log.debug("looked for leftover uplinks in vain: %s", error)
        return self

    async def __aexit__(self, *error: object) -> None:
        async with self._changing:
            await self._resolver.close(keep=self._left)
            while self._shared:
                _, shared = self._shared.popitem()
                await in_thread(shared.close)

    async def acquire(self, policy: NetworkPolicy) -> Namespace:
        """The use of a namespace in which `policy` holds.

        HostError: the host lacks what that takes.
        """
        if policy == NONE:
            return Namespace(self, policy)
        async with self._changing:
            if policy not in self._shared:
                await uncancelled(self._make(policy))
            return self._use(policy)

    async def adopt(self, policy: NetworkPolicy, pid: int, uplink: str | None) -> Namespace:
        """The use of the namespace that process `pid` is in, made by an engine that is gone.

        `uplink`: its way out, as `Namespace.uplink` has said. HostError: the process is gone.
        """
        if policy == NONE:
            return Namespace(self, policy)
        async with self._changing:
            if policy not in self._shared:
                try:
                    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise HostError(f"process {pid} has no network namespace: {error}") from None
                self._shared[policy] = _Shared(fd, Uplink(uplink) if uplink else None)
            return self._use(policy)

    async def let_go(self) -> None:
        """Leave what is in use to the machines in it, and to who takes them over."""
        async with self._changing:
            for policy, shared in tuple(self._shared.items()):
                if shared.users:
                    self._left = True
                    del self._shared[policy]
                    os.close(shared.fd)

    def _use(self, policy: NetworkPolicy) -> Namespace:
        self._resolver.follow()
        shared = self._shared[policy]
        shared.users += 1
        return Namespace(self, policy, shared.fd, self._resolver.path)

    def _uplink(self, policy: NetworkPolicy) -> str | None:
        uplink = self._shared[policy].uplink if policy in self._shared else None
        return uplink.name if uplink else None

    async def _make(self, policy: NetworkPolicy) -> None:
        try:
            fd = new_namespace()
        except PermissionError:
            raise HostError(
                f"the network policy {policy} takes root: it is enforced by the host's firewall; "
                "without root there is `none` alone"
            ) from None
        try:
            laid = await asyncio.to_thread(Uplink.lay, fd, policy)
        except HostError as error:
            os.close(fd)
            raise HostError(f"the network policy {policy} cannot be had here: {error}") from error
        except BaseException:
            os.close(fd)
            raise
        self._shared[policy] = _Shared(fd, laid)

    async def _release(self, policy: NetworkPolicy) -> None:
        async with self._changing:
            shared = self._shared.get(policy)
            if shared is None:  # all are gone already
                return
            shared.users -= 1
            if not shared.users:
                del self._shared[policy]
                await in_thread(shared.close)
