"""A start that was kept is of its volumes: a run with others is another one."""

from __future__ import annotations

from ratoon.sandbox.options import SandboxOptions, Volume
from ratoon.sources.image import Image, ImageConfig
from ratoon.startup.key import Booted, Started, differences, started
from ratoon.startup.spec import CommandHealth, RunSpec


def document(*volumes: Volume) -> Started:
    spec = RunSpec(image="debian", command=("serve",), health=CommandHealth(argv=("true",)))
    image = Image("debian", "blake3:00", ImageConfig())
    return started(Booted.model_construct(), image, spec, SandboxOptions(volumes=volumes))


def test_volumes_are_in_the_key() -> None:
    given = document(Volume(source="/srv", target="/mnt", read_only=True))
    assert given.key == document(Volume(source="/srv", target="/mnt", read_only=True)).key
    for other in (
        document(),
        document(Volume(source="/srv", target="/mnt")),
        document(Volume(source="/other", target="/mnt", read_only=True)),
    ):
        assert other.key != given.key
        assert all(each.field.startswith("mounts") for each in differences(given, other))
