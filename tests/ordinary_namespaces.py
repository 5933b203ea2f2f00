"""Namespaces of an ordinary user, who has them as he is told: by lines of words, each answered.

A program of its own, run by `ordinary_user.py`: `ordinary_namespaces.py DIRECTORY PID…`. It is root
in a user namespace, in that of one of the processes if they are given.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from ratoon.errors import HostError
from ratoon.jail import user_namespace
from ratoon.machine.network.namespaces import Namespace, Namespaces
from ratoon.machine.network.netns import inside
from ratoon.machine.network.policy import NetworkPolicy


class Owner:
    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self._held: dict[str, Namespace] = {}

    async def acquire(self, policy: str) -> tuple[int | None, str | None]:
        """Its descriptor, and its uplink."""
        return self._hold(await self._namespaces.acquire(NetworkPolicy.parse(policy)))

    async def adopt(self, policy: str, pid: str, uplink: str) -> tuple[int | None, str | None]:
        wanted = NetworkPolicy.parse(policy)
        return self._hold(await self._namespaces.adopt(wanted, int(pid), uplink))

    def _hold(self, namespace: Namespace) -> tuple[int | None, str | None]:
        self._held[str(namespace.policy)] = namespace
        return namespace.fd, namespace.uplink

    async def inhabit(self, policy: str) -> int:
        """A process in it, which lives on."""
        fd = self._held[policy].fd
        assert fd is not None
        words = ["sleep", "1000"]
        devnull = subprocess.DEVNULL
        return inside(fd, lambda: subprocess.Popen(words, stdout=devnull, stderr=devnull).pid)

    async def resolver(self, policy: str) -> str:
        path = self._held[policy].resolver
        assert path
        return path.read_text()

    async def release(self, policy: str) -> None:
        await self._held.pop(policy).release()

    async def say(self, word: str) -> str:
        return word

    async def let_go(self) -> None:
        await self._namespaces.let_go()


async def main() -> None:
    async with Namespaces(Path(sys.argv[1])) as namespaces:
        owner = Owner(namespaces)
        while line := await asyncio.to_thread(sys.stdin.readline):
            verb, *words = line.split()
            try:
                answer = await getattr(owner, verb)(*words)
            except HostError as error:
                answer = f"HostError: {error}"
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    user_namespace.enter(map(int, sys.argv[2:]))
    asyncio.run(main())
