"""Taking over the sandboxes of an engine that is gone: it was stopped, or it died at any moment.

A record says what was true, or was about to be. What a machine itself says decides: one that is
paused was being branched or suspended, and goes on; an overlay that was switched to belongs to a
branch that was cut short, unless its snapshot was published.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from ratoon.engine.sandbox.capture import thaw
from ratoon.engine.sandbox.directory import PARENT, SandboxDirectory
from ratoon.engine.sandbox.incarnation import Incarnation
from ratoon.engine.sandbox.mounts import Mounts
from ratoon.engine.sandbox.record import Record, RunRecord, is_alive, read_record
from ratoon.engine.sandbox.sandbox import Owner, Sandbox
from ratoon.engine.sandbox.start import oserror_as_hosterror
from ratoon.engine.sandbox.sweep import kill_strays
from ratoon.errors import (
    GuestError,
    HostError,
    Incompatible,
    MachineDied,
    MachineError,
    OutOfDisk,
    RatoonError,
)
from ratoon.machine.guest.channel import Channel
from ratoon.machine.host.cgroups import find
from ratoon.machine.host.limits import Limits
from ratoon.machine.network.namespaces import Namespace, Namespaces
from ratoon.machine.network.policy import NONE
from ratoon.machine.vmm.logs import log_tail
from ratoon.machine.vmm.qemu import QemuMachine
from ratoon.store.snapshot.snapshot import Snapshot, load_snapshot
from ratoon.store.snapshot.store import Store

log = logging.getLogger(__name__)

#: Seconds for an agent to answer whoever takes over; a loaded host under emulation is slow.
HELLO_TIMEOUT = 60.0


async def adopt(
    store: Store, namespaces: Namespaces, directory: SandboxDirectory, owner: Owner
) -> Sandbox:
    """The sandbox in a directory that is held and has a record: as it was, or dead, or outdated.

    Corrupt: it cannot be made out what it stands on.
    """
    record = read_record(directory.path)
    assert record is not None
    if outdated := await _find_outdated(store, directory, record, owner):
        return outdated
    run, death = None, None
    if record.run is None or not is_alive(record.run):
        await asyncio.to_thread(kill_strays, directory.path)
        stood_by = directory.has_standby()
        parent = directory.parent()
        mounts = await _hold(store, record)
        if record.run and not stood_by:
            death = MachineDied(
                f"sandbox {record.id} died while nobody looked after it (process {record.run.pid})",
                log_tail(directory.log),
            )
    else:
        await asyncio.to_thread(kill_strays, directory.path, keep=record.run.pid)
        parent = directory.parent(runs=True)
        mounts = await _hold(store, record)
        try:
            namespace = await namespaces.adopt(
                record.options.network or NONE, record.run.pid, record.run.uplink
            )
            run, parent = await _attach(
                store, directory, record.run, namespace, record.options.limits, parent, mounts
            )
        except (HostError, MachineError, GuestError) as error:
            await asyncio.to_thread(kill_strays, directory.path)
            death = MachineDied(f"sandbox {record.id} could not be taken over: {error}")
    sandbox = Sandbox(
        directory,
        run,
        record,
        owner,
        parent=parent,
        origin=await asyncio.to_thread(_origin, store, directory, parent),
        mounts=mounts,
        lost=death,
        kept=True,
    )
    if run is None and death is None:
        directory.forget_overlays()
    if death is None:
        sandbox.persist()
    return sandbox


async def _find_outdated(
    store: Store, directory: SandboxDirectory, record: Record, owner: Owner
) -> Sandbox | None:
    """The sandbox, if its QEMU is too old; nothing of it is touched."""
    try:
        parent = load_snapshot(directory.path / PARENT)
    except RatoonError:  # somebody died while it was replaced
        return None
    machine = parent.manifest.machine
    if not machine.is_outdated:
        return None
    lost = Incompatible(
        f"sandbox {record.id} {'runs on' if record.run else 'stands by for'} QEMU "
        f"{machine.qemu_version}, to which this Ratoon does not speak. It is kept as it is: kill "
        "it, or stop this daemon and have the Ratoon that made it serve it"
    )
    log.warning("%s", lost)
    mounts = await _hold(store, record)
    return Sandbox(
        directory, None, record, owner, parent=parent, origin=None, mounts=mounts, lost=lost
    )


async def _attach(
    store: Store,
    directory: SandboxDirectory,
    record: RunRecord,
    namespace: Namespace,
    limits: Limits,
    parent: Snapshot,
    mounts: Mounts,
) -> tuple[Incarnation, Snapshot]:
    name = directory.id
    try:
        machine = await QemuMachine.attach(name, record.pid, directory.log, record.runtime)
    except BaseException:
        await namespace.release()
        raise
    channel, volumes = None, None
    try:
        # Before the agent is asked anything: it may be waiting for a file of theirs.
        volumes = mounts.serve(name, machine)
        await machine.confine(find(directory.path, limits), limits.disk_bytes)
        overlay = await machine.active_overlay(directory.overlays())
        channel = await Channel.connect(machine.agent_socket, name)
        run = Incarnation(
            machine, channel, record.memory, overlay, record.runtime, namespace, volumes
        )
        if not await machine.is_running():
            log.info("sandbox %s was left paused", name)
            await machine.resume()
        await _greet(name, run, mounts)
        is_older = overlay != record.overlay and _has_disk(parent, record.overlay)
        if not is_older:
            with oserror_as_hosterror(f"sandbox {name} was not taken over"):
                parent = await _catch_up(store, directory, record, parent)
                if overlay != record.overlay:
                    parent = await _end_branch(store, directory, run, record.overlay, parent)
        directory.forget_overlays(run.overlay, run.frozen)
        if not run.frozen:
            await machine.settle_overlay()
    except BaseException:
        if channel:
            channel.close()
        if volumes:
            await asyncio.to_thread(volumes.close)
        await machine.let_go()
        await namespace.release()
        raise
    return run, parent


async def _hold(store: Store, record: Record) -> Mounts:
    """The sandbox's volumes; without those that are gone, or somebody else's by now."""
    try:
        return await asyncio.to_thread(Mounts.hold, store.home, record.id, record.options.volumes)
    except RatoonError as error:
        log.warning("sandbox %s has lost its volumes: %s", record.id, error)
        return Mounts.none()


async def _greet(name: str, run: Incarnation, mounts: Mounts) -> None:
    """Begin a session with the agent, unless the guest stands still; then there is no hurry."""
    run.channel.begin()
    try:
        async with run.machine.while_moving():
            reply = await run.channel.request("hello", timeout=HELLO_TIMEOUT)
            if reply.get("volumes") is True and run.volumes is None:
                run.volumes = mounts.serve(name, run.machine, inherits=True)
            await thaw(name, run)
    except OutOfDisk as error:
        log.warning("%s", error)


def _has_disk(snapshot: Snapshot, disk: Path) -> bool:
    layers = range(snapshot.depth + 1)
    return any(snapshot.disk_path(layer).samefile(disk) for layer in layers)


async def _catch_up(
    store: Store, directory: SandboxDirectory, record: RunRecord, parent: Snapshot
) -> Snapshot:
    """Have the directory tell what the machine stands on: a reset, or a branch, was cut short."""
    if record.stands_on in (None, parent.manifest.id):
        return parent
    origin = directory.origin(parent)
    if origin and origin.manifest.id == record.stands_on:
        return directory.go_back(origin)
    found = await asyncio.to_thread(store.find, lambda each: each.manifest.id == record.stands_on)
    if found is None:
        raise MachineError("the snapshot that it stands on is gone")
    return directory.stand_on(found)


def _origin(store: Store, directory: SandboxDirectory, parent: Snapshot) -> Snapshot | None:
    """What a reset goes back to, as it lies there; of an older Ratoon's sandbox from the store."""
    if found := directory.origin(parent):
        return found
    layers = reversed(parent.manifest.layers)
    last = next(each for each in layers if not (each.anonymous and each.tag == directory.id))
    try:
        snapshot = store.get(last.tag)
        if snapshot.manifest.id == last.id:
            return directory.keep_origin(snapshot)
    except (RatoonError, OSError) as error:
        log.warning("what sandbox %s would be reset to is gone: %s", directory.id, error)
    return None


async def _end_branch(
    store: Store, directory: SandboxDirectory, run: Incarnation, frozen: Path, parent: Snapshot
) -> Snapshot:
    """A branch was cut short after the switch: stand on its snapshot, or undo the switch."""
    if frozen.stat().st_nlink > 1:  # published, and only that was not taken note of
        found = await asyncio.to_thread(
            store.find, lambda each: each.disk_path(each.depth).samefile(frozen)
        )
        if found is None:  # to undo the switch would be to write to what others stand on
            raise MachineError("its disk is part of a snapshot that is gone")
        return directory.stand_on(found)
    run.frozen = frozen
    log.info("sandbox %s: a branch that was cut short is undone", directory.id)
    await run.undo_branch()
    return parent


def lost(directory: SandboxDirectory, error: RatoonError) -> None:
    """Remove a sandbox that cannot be taken over."""
    log.error("sandbox %s cannot be taken over and is removed: %s", directory.id, error)
    kill_strays(directory.path)
    directory.remove()
