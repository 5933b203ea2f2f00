"""Running an image: the first run boots it and waits until it is up, the next forks what was kept.

Tier 1 is a base, made when the guest is up and before any command was started. Tier 2 is a diff on
it, made once the command has passed its health check; its forks have the command running.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ratoon.artifacts import Progress, silent
from ratoon.engine.sandbox.accelerator import Probe, choose_accelerator
from ratoon.engine.sandbox.branch import Branched
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.mounts import directory_of
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.engine.sandbox.stages import Stages
from ratoon.engine.sandbox.start import oserror_as_hosterror
from ratoon.engine.sources.image import Image
from ratoon.engine.sources.resolve import resolve
from ratoon.engine.startup.cache import Entry, StartCache, tag_of
from ratoon.engine.startup.content import describe_content
from ratoon.engine.startup.health import Wait
from ratoon.engine.startup.key import Booted, Started, booted, only_content_differs, started
from ratoon.engine.startup.spec import RunSpec
from ratoon.errors import (
    Conflict,
    Corrupt,
    Incompatible,
    InvalidInput,
    NotFound,
    NotHealthy,
    RatoonError,
)
from ratoon.machine.guest import commands
from ratoon.machine.guest.build import Guest, build_guest
from ratoon.machine.vmm.cpu import named_model
from ratoon.store.snapshot.links import ram_pages, read_links
from ratoon.store.snapshot.snapshot import Snapshot

log = logging.getLogger(__name__)

#: How often it is tried to keep a start whose volumes change meanwhile: a branch has the guest
#: write back what it has not yet, so the second attempt is the one that fits.
ATTEMPTS = 3


@dataclass(frozen=True)
class Run:
    """A sandbox in which a command runs, or is to.

    `tier`: what was there to fork from: 2, the command as it was up; 1, the image as it was booted;
    0, nothing. `missed` says why no more. `pid` is the command's in the guest, None if it was not
    to be started; `argv` is all of it. `stages`: how long each took, in milliseconds.
    """

    sandbox: Sandbox
    argv: tuple[str, ...]
    pid: int | None
    tier: Literal[0, 1, 2]
    missed: tuple[str, ...]
    stages: dict[str, float]


@dataclass(frozen=True)
class _Wish:
    """One run, as far as it was found out beforehand."""

    spec: RunSpec
    options: SandboxOptions
    image: Image
    booted: Booted
    argv: list[str]
    refresh: bool
    roots: Sequence[Path] | None
    progress: Progress
    stages: Stages
    missed: list[str] = field(default_factory=list)


class Runner:
    """Runs images with one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        #: The starts that are kept.
        self.cache = StartCache(engine.store)
        #: What the engine's guests boot from: to find that out takes seconds where apt is asked.
        self._host: tuple[Guest, Probe] | None = None

    async def run(
        self,
        spec: RunSpec,
        options: SandboxOptions | None = None,
        *,
        start: bool = True,
        cache: bool = True,
        refresh: bool = False,
        roots: Sequence[Path] | None = None,
        progress: Progress = silent,
    ) -> Run:
        """Have an image's command run in a sandbox of its own, which has passed its health check.

        `start`: False leaves the command, which has no health check then, to the caller. `cache`:
        False uses nothing that was kept, and keeps nothing. `refresh`: the image is looked up
        again, and what was kept of this run is made anew. `roots`: see `resolve`.

        If it fails, or is cancelled, there is no sandbox. NotHealthy; InvalidInput: there is no
        command, or it cannot be executed; what `resolve`, `from_image` and `fork_one` raise.
        """
        options = options or SandboxOptions()
        if spec.cpu is not None:
            named_model(spec.cpu)
        stages = Stages()
        with stages("resolve"):
            image = await asyncio.to_thread(
                resolve, spec.image, refresh=refresh, roots=roots, progress=progress
            )
            guest, probe = await self._guest(refresh, progress)
        argv = image.config.argv(spec.command, spec.entrypoint)
        if spec.health and not argv:
            raise InvalidInput(f"{image.name} has no command of its own: say which is to run")
        if spec.health and not start:
            raise InvalidInput("a command with a health check is started here, and waited for")
        wish = _Wish(
            spec,
            options,
            image,
            booted(image, spec, guest, probe),
            argv,
            refresh,
            roots,
            progress,
            stages,
        )
        if spec.health and cache:
            return await self._from_started(wish)
        sandbox, tier = await (self._from_booted(wish) if cache else self._aside(wish))
        try:
            pid = await self._begin(sandbox, wish) if start and argv else None
        except BaseException:
            await sandbox.kill()
            raise
        return _run(wish, sandbox, pid, tier)

    async def _guest(self, refresh: bool, progress: Progress) -> tuple[Guest, Probe]:
        if self._host is None or refresh:
            guest = await asyncio.to_thread(build_guest, progress)
            self._host = guest, await choose_accelerator(guest, progress)
        return self._host

    # The tiers ------------------------------------------------------------------------------------

    async def _from_started(self, wish: _Wish) -> Run:
        document = await self._document(wish)
        found = await self._fork(document, wish)
        if not isinstance(found, str):
            return _run(wish, *found, 2)
        async with self.cache.making(2, document.key):
            found = await self._fork(document, wish)  # somebody else may have made it meanwhile
            if not isinstance(found, str):
                return _run(wish, *found, 2)
            wish.missed.append(f"tier 2: {found}")
            sandbox, tier = await self._from_booted(wish)
            try:
                pid = await self._begin(sandbox, wish)
                try:
                    await self._keep(sandbox, pid, wish)
                except NotHealthy:
                    raise
                except RatoonError as error:
                    log.warning("the start of %s was not kept: %s", wish.image.name, error)
                    wish.missed.append(f"it was not kept: {error}")
            except BaseException:
                await sandbox.kill()
                raise
        return _run(wish, sandbox, pid, tier)

    async def _from_booted(self, wish: _Wish) -> tuple[Sandbox, Literal[0, 1]]:
        found = await self._fork(wish.booted, wish)
        if not isinstance(found, str):
            return found[0], 1
        async with self.cache.making(1, wish.booted.key):
            found = await self._fork(wish.booted, wish)
            if not isinstance(found, str):
                return found[0], 1
            wish.missed.append(f"tier 1: {found}")
            tag = tag_of(wish.booted.key)
            await self._discard(wish.booted)
            snapshot = await self._boot(wish, tag)
            self.cache.write(
                wish.booted,
                snapshot,
                image=wish.image.name,
                pid=None,
                stages_ms=snapshot.manifest.stages,
            )
            with wish.stages("fork"):
                return await self._engine.fork_one(tag, wish.options), 0

    async def _aside(self, wish: _Wish) -> tuple[Sandbox, Literal[0]]:
        """A fork of a base of its own, which goes at once: a sandbox has links to all it needs."""
        wish.missed.append("nothing that was kept was to be used")
        key = secrets.token_hex(32)
        async with self.cache.making(1, key):  # so that nobody takes it for litter
            await self._boot(wish, tag_of(key))
            try:
                with wish.stages("fork"):
                    return await self._engine.fork_one(tag_of(key), wish.options), 0
            finally:
                await self._engine.delete(tag_of(key), force=True)

    async def _fork(
        self, document: Booted | Started, wish: _Wish
    ) -> tuple[Sandbox, int | None] | str:
        """A fork of what was kept for `document` and the command's pid there, or why there is none.

        What this QEMU or processor cannot load, or is damaged, is not loaded.
        """
        if wish.refresh:
            return "it is to be made anew"
        try:
            entry = self.cache.find(document, wish.image.name)
            with wish.stages("fork"):
                sandbox = await self._engine.fork_one(entry.snapshot.tag, wish.options)
        except (NotFound, Incompatible, Corrupt) as error:
            return str(error)
        if not _stands_on(sandbox, entry):
            await sandbox.kill()
            return f"its snapshot {entry.snapshot.tag} was made anew meanwhile"
        self.cache.touch(entry)
        return sandbox, entry.pid

    # What they are made of ------------------------------------------------------------------------

    async def _boot(self, wish: _Wish, tag: str) -> Snapshot:
        """A base of the image under `tag`. Conflict: it is another image by now."""
        spec, document = wish.spec, wish.booted
        with wish.stages("boot"):
            built = await self._engine.bases.from_image(
                spec.image,
                tag,
                ram_bytes=spec.ram_bytes,
                vcpus=spec.vcpus,
                disk_bytes=spec.disk_bytes,
                cpu=spec.cpu,
                roots=wish.roots,
                progress=wish.progress,
            )
        manifest = built.branched.snapshot.manifest
        machine = manifest.machine
        made = manifest.guest.digest, machine.kernel_digest, machine.initramfs_digest
        if tag == tag_of(document.key) and made != (
            document.image,
            document.kernel,
            document.initramfs,
        ):
            self._host = None
            await self._engine.delete(tag, force=True)
            raise Conflict(
                f"image {wish.image.name}, or what guests boot from, changed while it was booted; "
                "run it again"
            )
        return built.branched.snapshot

    async def _begin(self, sandbox: Sandbox, wish: _Wish) -> int:
        """Start the command in the background and wait until it is up; its pid."""
        name, health = wish.argv[0], wish.spec.health
        with wish.stages("start"):
            async with commands.start(
                sandbox,
                wish.argv,
                background=True,
                main=True,
                own_pids=not wish.spec.init,
            ) as running:
                if running.pid is None:
                    ended = await running.wait()
                    raise InvalidInput(ended.error or f"{name} could not be started")
                if health:
                    wish.progress(f"waiting until {name} is up")
                    await Wait(sandbox, name, health).until_healthy(running)
                return running.pid
        raise AssertionError

    async def _document(self, wish: _Wish) -> Started:
        """What the start of its command depends on, its volumes as they are now."""

        def contents() -> dict[str, str]:
            home = self._engine.store.home
            return {
                volume.target: describe_content(directory_of(home, volume))
                for volume in wish.options.volumes
            }

        with oserror_as_hosterror(f"{wish.image.name} was not run"):
            found = await asyncio.to_thread(contents)
        return started(wish.booted, wish.image, wish.spec, wish.options, found)

    async def _keep(self, sandbox: Sandbox, pid: int, wish: _Wish) -> None:
        """Keep the command as it is now. NotHealthy: it has ended meanwhile."""
        document, branched = await self._branch(sandbox, wish)
        tag = tag_of(document.key)
        listed = [each for each in await commands.processes(sandbox) if each.pid == pid]
        if not listed or listed[0].exit_code is not None:
            await self._engine.delete(tag, force=True)
            raise NotHealthy(
                f"{wish.argv[0]} ended as soon as it was up",
                status=listed[0].exit_code if listed else None,
            )
        self.cache.write(
            document,
            branched.snapshot,
            image=wish.image.name,
            pid=pid,
            stages_ms={name: ms for name, ms in wish.stages.ms.items() if name != "resolve"},
        )
        for each in self.cache.entries():
            if only_content_differs(each.document, document):
                await self._discard(each.document)
        with wish.stages("image"):
            await asyncio.to_thread(self._make_image, branched.snapshot)

    async def _branch(self, sandbox: Sandbox, wish: _Wish) -> tuple[Started, Branched]:
        """A snapshot of the command that goes with what its volumes hold.

        Conflict: that would not stand still. What the command itself has changed there since it was
        begun is in the document, so its key may be another one than was looked for.
        """
        document = await self._document(wish)
        for _ in range(ATTEMPTS):
            wish.progress(f"keeping it as {tag_of(document.key)}")
            with wish.stages("branch"):
                await self._discard(document)
                branched = await self._engine.branch(sandbox, tag_of(document.key))
            after = await self._document(wish)
            if after == document:
                return document, branched
            await self._engine.delete(tag_of(document.key), force=True)
            document = after
        raise Conflict("what is in its volumes changes all the time")

    def _make_image(self, snapshot: Snapshot) -> None:
        """So that the next fork is no first one, which it would take longer."""
        self._engine.images.make(read_links(snapshot), ram_pages(snapshot))

    async def _discard(self, document: Booted | Started) -> None:
        """Remove what was kept for it, and what a crash may have left."""
        self.cache.remove(document.key)
        with suppress(NotFound):
            await self._engine.delete(tag_of(document.key), force=True)


def _run(wish: _Wish, sandbox: Sandbox, pid: int | None, tier: Literal[0, 1, 2]) -> Run:
    argv, missed = tuple(wish.argv), tuple(wish.missed)
    return Run(sandbox, argv, pid, tier, missed, wish.stages.ms)


def _stands_on(sandbox: Sandbox, entry: Entry) -> bool:
    return sandbox.parent.manifest.id == entry.snapshot.id
