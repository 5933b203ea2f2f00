"""The namespaces that an engine's machines run in: one for each policy that is in use.

A machine without network has an empty one of its own, from its cell. Any other policy has one with
an uplink to the host's network, or to what stands for that (`world`), made when it is first asked
for and removed with its last user. Sandboxes that share a namespace do not meet in it: see
`rules.inside`. Namespaces have no names, so the kernel frees those of a killed engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from ratoon.concurrency import in_thread
from ratoon.errors import HostError
from ratoon.machine.network import uplink, world
from ratoon.machine.network.netns import new_namespace
from ratoon.machine.network.policy import NONE, NetworkPolicy
from ratoon.machine.network.resolver import Resolver
from ratoon.machine.network.uplink import Uplink, choose_pool, is_connected, routes
from ratoon.machine.network.world import World

log = logging.getLogger(__name__)


@dataclass
class _Shared:
    """A namespace, its way out, if it has one at the moment, and how many use it."""

    fd: int
    uplink: Uplink | None = None
    users: int = 0


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

    In `directory` are a file that they have mounted, and what a world is found by.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._resolver = Resolver(directory / "resolv.conf")
        #: Machines that use some live on.
        self._left = False
        #: Where the uplinks are laid, once there is one.
        self._world: World | None = None
        self._shared: dict[NetworkPolicy, _Shared] = {}
        self._changing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Remove what a killed engine has left."""
        self._world = await asyncio.to_thread(world.find, self._directory)
        if self._world:
            try:
                await asyncio.to_thread(self._world.run, uplink.sweep)
            except HostError as error:  # it matters to those alone who want an uplink
                log.debug("looked for leftover uplinks in vain: %s", error)
        return self

    async def __aexit__(self, *error: object) -> None:
        async with self._changing:
            await self._resolver.close(keep=self._left)
            while self._shared:
                _, shared = self._shared.popitem()
                await in_thread(self._close, shared)
            if self._world:
                await in_thread(self._world.leave if self._left else self._world.close)

    async def acquire(self, policy: NetworkPolicy) -> Namespace:
        """The use of a namespace in which `policy` holds.

        HostError: the host lacks what that takes.
        """
        if policy == NONE:
            return Namespace(self, policy)
        async with self._changing:
            try:
                await in_thread(self._provide, policy)
            except HostError as error:
                raise HostError(
                    f"the network policy {policy} cannot be had here: {error}"
                ) from error
            return self._use(policy)

    async def adopt(self, policy: NetworkPolicy, pid: int, uplink: str | None) -> Namespace:
        """The use of the namespace that process `pid` is in, made by an engine that is gone.

        `uplink`: its way out, as `Namespace.uplink` has said. It is given another one if that is
        gone as well, or none if there is none to be had. HostError: the process is gone.
        """
        if policy == NONE:
            return Namespace(self, policy)
        async with self._changing:
            if policy not in self._shared:
                try:
                    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise HostError(f"process {pid} has no network namespace: {error}") from None
                shared = self._shared[policy] = _Shared(fd)
                if uplink and self._world and is_connected(fd):
                    shared.uplink = Uplink(uplink)
                try:
                    await in_thread(self._provide, policy)
                except HostError as error:
                    log.warning("sandboxes with the policy %s are cut off: %s", policy, error)
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
        self._resolver.follow(self._world.resolver if self._world else None)
        shared = self._shared[policy]
        shared.users += 1
        return Namespace(self, policy, shared.fd, self._resolver.path)

    def _uplink(self, policy: NetworkPolicy) -> str | None:
        uplink = self._shared[policy].uplink if policy in self._shared else None
        return uplink.name if uplink else None

    def _provide(self, policy: NetworkPolicy) -> None:
        """Have a namespace for `policy`, and all that there are connected to a world that is there.

        HostError: it takes what this host lacks.
        """
        is_new = policy not in self._shared
        if is_new:
            try:
                self._shared[policy] = _Shared(new_namespace())
            except PermissionError:
                raise HostError(
                    "it takes root, if only in a user namespace: run `ratoon serve`, and use its "
                    "daemon; without that there is `none` alone"
                ) from None
        try:
            if self._world is None or not self._world.is_there():
                self._renew_world()
            self._connect()
        except BaseException:
            if is_new:
                self._close(self._shared.pop(policy))
            raise

    def _renew_world(self) -> None:
        gone, self._world = self._world, world.make(self._directory)
        for shared in self._shared.values():
            shared.uplink = None
        if gone:
            gone.leave()

    def _connect(self) -> None:
        assert self._world
        for policy, shared in self._shared.items():
            if shared.uplink is None:
                pool = choose_pool(routes())  # the host's, whatever world this is
                lay = partial(Uplink.lay, shared.fd, policy, pool)
                shared.uplink = self._world.run(lay)

    def _close(self, shared: _Shared) -> None:
        if shared.uplink and self._world:
            self._world.run(shared.uplink.remove)
        os.close(shared.fd)

    async def _release(self, policy: NetworkPolicy) -> None:
        async with self._changing:
            shared = self._shared.get(policy)
            if shared is None:  # all are gone already
                return
            shared.users -= 1
            if not shared.users:
                del self._shared[policy]
                await in_thread(self._close, shared)
