"""A sandbox's volumes: what it holds of the host's directories, and how its guest gets them.

Held from the fork to the end, in standby too. A writable volume is held by one sandbox alone, so no
two forks share one by accident; read-only ones are shared by any number. A fork has its source's
mounts in its kernel, but none of its volumes, unless its own options name them: what its processes
ask of those that it has not is answered with an error (ESTALE), and the mounts are taken away.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ratoon.engine.sandbox.options import Volume
from ratoon.errors import GuestError, InvalidInput
from ratoon.machine.guest.channel import Channel
from ratoon.machine.vmm.driver import Machine
from ratoon.machine.volumes.export import Export
from ratoon.machine.volumes.handles import key_of
from ratoon.machine.volumes.holds import hold
from ratoon.machine.volumes.named import directory, find
from ratoon.machine.volumes.relay import VolumeServer

#: Seconds for the guest to load the modules and to mount; a loaded host under emulation is slow.
MOUNT_TIMEOUT = 60.0


def directory_of(home: Path, volume: Volume) -> Path:
    """Where a volume is on the host; a named one of the store `home` is made if need be."""
    return find(home, volume.source) if volume.named else Path(volume.source)


class Mounts:
    """The volumes of one sandbox, open until `let_go`."""

    def __init__(self, volumes: Sequence[Volume], exports: Sequence[Export]) -> None:
        self._volumes = tuple(volumes)
        self._exports = tuple(exports)

    @classmethod
    def none(cls) -> Mounts:
        return cls((), ())

    @classmethod
    def hold(cls, home: Path, sandbox_id: str, volumes: Sequence[Volume]) -> Mounts:
        """Open the volumes for a sandbox of the store `home`; blocks.

        Conflict: another sandbox has one of them to write to. NotFound, InvalidInput: it can be no
        volume.
        """
        exports: list[Export] = []
        try:
            for volume in volumes:
                export = Export(
                    directory_of(home, volume), key_of(directory(home)), read_only=volume.read_only
                )
                exports.append(export)
                if not volume.read_only:
                    hold(export, f"sandbox {sandbox_id}")
        except BaseException:
            for export in exports:
                export.close()
            raise
        return cls(volumes, exports)

    def let_go(self) -> None:
        """Others may have them now; safe to repeat."""
        for export in self._exports:
            export.close()
        self._volumes = self._exports = ()

    def serve(self, name: str, machine: Machine, *, inherits: bool = False) -> VolumeServer | None:
        """Answer what the guest asks of its volumes; GuestError.

        None: it has no volumes, and `inherits` none of its source's, which it would have to be told
        are not its own.
        """
        if not self._exports and not inherits:
            return None
        exports = {export.id: export for export in self._exports}
        return VolumeServer(name, machine.volumes_socket, exports)

    async def arrange(self, channel: Channel, *, stale: bool) -> None:
        """Have the guest mount its volumes, and no others; served meanwhile.

        `stale`: its kernel knows of them what they were when a snapshot was taken.

        InvalidInput: one cannot be mounted where it is to be. GuestError.
        """
        volumes = [
            {
                "target": volume.target,
                "root": export.handles.root.hex(),
                "read_only": volume.read_only,
                # Others may write to any directory of the host, but to these one sandbox at a time.
                "own": volume.named and not volume.read_only,
            }
            for volume, export in zip(self._volumes, self._exports, strict=True)
        ]
        ordered = sorted(volumes, key=lambda each: str(each["target"]))
        try:
            await channel.request("volumes", timeout=MOUNT_TIMEOUT, volumes=ordered, stale=stale)
        except GuestError as error:
            if error.kind != "target":
                raise
            raise InvalidInput(f"a volume cannot be mounted: {error}") from None
