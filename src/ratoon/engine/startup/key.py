"""What a kept start depends on, as documents that people can read; their digests are the keys.

What is not in them must make no difference, and whatever is makes another key. The rate of the
host's time stamp counter is not: it is measured, and comes out a little different each time. It is
compared when a snapshot is to be forked, as with any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from blake3 import blake3

from ratoon.documents import Document
from ratoon.engine.sandbox.accelerator import Probe
from ratoon.engine.sandbox.boot import kernel_words
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sources.image import Image
from ratoon.engine.startup.spec import RunSpec
from ratoon.machine.guest.build import Guest
from ratoon.machine.guest.shared import wire
from ratoon.machine.network.policy import NONE
from ratoon.machine.vmm import command
from ratoon.machine.vmm.driver import Accelerator
from ratoon.machine.vmm.qemu import qemu_version

#: Characters of a value that are shown, and of those how many both have before they differ.
_SHOWN, _ALIKE = 80, 20


class _Document(Document):
    @property
    def key(self) -> str:
        """BLAKE3, hex, of the document as canonical JSON."""
        return blake3(canonical(self.model_dump(mode="json"))).hexdigest()


class Booted(_Document):
    """Tier 1: an image that was booted, before any command ran.

    `image`, `kernel` and `initramfs` are digests; the agent is in the initramfs. `host_cpu` is None
    where the guest's processor is emulated, and so does not depend on it.
    """

    format: Literal[1] = 1
    tier: Literal[1] = 1
    image: str
    kernel: str
    kernel_words: tuple[str, ...]
    initramfs: str
    agent_protocol: int
    ram_bytes: int
    vcpus: int
    disk_bytes: int
    machine: str
    devices: tuple[str, ...]
    qemu_version: str
    accelerator: Accelerator
    cpu: str
    host_cpu: str | None


class Mount(_Document):
    """A volume. `content`: what it held when the start was kept; see `describe_content`."""

    source: str
    read_only: bool
    content: str


class Started(_Document):
    """Tier 2: a command that was started in that, and passed its health check.

    All of it as it was resolved: the command with the image's entrypoint, the environment with the
    image's, volumes by where they are mounted.
    """

    format: Literal[2] = 2
    tier: Literal[2] = 2
    booted: Booted
    argv: tuple[str, ...]
    init: bool
    environment: dict[str, str]
    user: str | None
    workdir: str | None
    network: str
    mounts: dict[str, Mount]
    health: dict[str, Any]


class Difference(NamedTuple):
    """A field that two documents do not have in common; None: one of them lacks it."""

    field: str
    one: Any
    other: Any

    def __str__(self) -> str:
        one, other = _shown(self.one, self.other)
        return f"{self.field} is {one} there, {other} here"


def booted(image: Image, spec: RunSpec, guest: Guest, probe: Probe) -> Booted:
    """What a boot of `image` depends on, on this host."""
    return Booted(
        image=image.digest,
        kernel=guest.kernel_digest,
        kernel_words=kernel_words(probe.accelerator),
        initramfs=guest.initramfs_digest,
        agent_protocol=wire.VERSION,
        ram_bytes=spec.ram_bytes,
        vcpus=spec.vcpus,
        disk_bytes=spec.disk_bytes,
        machine=command.MACHINE,
        devices=command.DEVICES,
        qemu_version=qemu_version(),
        accelerator=probe.accelerator,
        cpu=spec.cpu or probe.cpu,
        host_cpu=_host_cpu() if probe.accelerator == "kvm" else None,
    )


def started(
    below: Booted,
    image: Image,
    spec: RunSpec,
    options: SandboxOptions,
    contents: Mapping[str, str],
) -> Started:
    """What the start of a command depends on, which must have a health check.

    `contents`: what each volume holds, by its target.
    """
    assert spec.health is not None
    return Started(
        booted=below,
        argv=tuple(image.config.argv(spec.command, spec.entrypoint)),
        init=spec.init,
        environment={**image.config.env, **options.env},
        user=options.user or image.config.user,
        workdir=options.workdir or image.config.workdir,
        network=str(options.network or NONE),  # as a fork of the base has it
        mounts={
            volume.target: Mount(
                source=volume.source,
                read_only=volume.read_only,
                content=contents[volume.target],
            )
            for volume in options.volumes
        },
        health=spec.health.checked,
    )


def differences(one: Booted | Started, other: Booted | Started) -> tuple[Difference, ...]:
    """The fields that differ, by their names with dots in between."""
    left, right = _flat(one.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
    return tuple(
        Difference(name, left.get(name), right.get(name))
        for name in sorted({*left, *right})
        if left.get(name) != right.get(name)
    )


def only_content_differs(one: Booted | Started, other: Booted | Started) -> bool:
    """Whether they are of one start, whose volumes held something else."""
    found = [each.field for each in differences(one, other)]
    return bool(found) and all(
        name.startswith("mounts.") and name.endswith(".content") for name in found
    )


def unfit(document: Booted | Started) -> tuple[Difference, ...]:
    """What forbids this host to load it, as far as it can be told without building anything."""
    below = document.booted if isinstance(document, Started) else document
    here = below.model_copy(
        update={
            "agent_protocol": wire.VERSION,
            "machine": command.MACHINE,
            "devices": command.DEVICES,
            "qemu_version": qemu_version(),
            "host_cpu": _host_cpu() if below.accelerator == "kvm" else None,
        }
    )
    return differences(below, here)


def canonical(value: Any) -> bytes:
    """The one encoding that equal values have."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in value.items():
        if isinstance(each, dict):
            found |= _flat(each, f"{prefix}{name}.")
        else:
            found[prefix + name] = each
    return found


def _shown(*values: Any) -> list[str]:
    """Values that differ, in words; of what is too long, where it begins to differ."""
    texts = [_in_words(value) for value in values]
    alike = sum(1 for _ in takewhile(lambda each: len({*each}) == 1, zip(*texts, strict=False)))
    skipped = max(0, alike - _ALIKE) if max(map(len, texts)) > _SHOWN else 0
    return [_cut(text, skipped) for text in texts]


def _cut(text: str, skipped: int) -> str:
    rest = text[skipped:]
    end = rest if len(rest) <= _SHOWN else rest[: _SHOWN - 1] + "…"
    return f"…{end}" if skipped else end


def _in_words(value: Any) -> str:
    if value is None:
        return "nothing"
    return value if isinstance(value, str) else json.dumps(value)


@cache
def _host_cpu() -> str:
    """The processor that a guest under KVM sees: what it is called, and a digest of what it can."""
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    which = [facts.get(name) for name in ("vendor_id", "cpu family", "model", "stepping", "flags")]
    return f"{facts.get('model name')} {blake3(canonical(which)).hexdigest()[:16]}"
