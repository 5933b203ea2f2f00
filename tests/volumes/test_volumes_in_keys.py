"""A start that was kept is of its volumes: a run with others is another one."""

from __future__ import annotations

from ratoon.engine.sandbox.options import SandboxOptions, Volume
from ratoon.engine.sources.image import Image
from ratoon.engine.startup.key import Booted, Started, differences, only_content_differs, started
from ratoon.engine.startup.spec import CommandHealth, RunSpec
from ratoon.store.snapshot.image_config import ImageConfig


def document(*volumes: Volume, content: str = "1 names, 00") -> Started:
    spec = RunSpec(image="debian", command=("serve",), health=CommandHealth(argv=("true",)))
    image = Image("debian", "blake3:00", ImageConfig())
    contents = {volume.target: content for volume in volumes}
    return started(Booted.model_construct(), image, spec, SandboxOptions(volumes=volumes), contents)


def test_volumes_are_in_the_key() -> None:
    given = document(Volume(source="/srv", target="/mnt", read_only=True))
    assert given.key == document(Volume(source="/srv", target="/mnt", read_only=True)).key
    for other in (
        document(),
        document(Volume(source="/srv", target="/mnt")),
        document(Volume(source="/other", target="/mnt", read_only=True)),
        document(Volume(source="/srv", target="/mnt", read_only=True), content="1 names, 11"),
    ):
        assert other.key != given.key
        assert all(each.field.startswith("mounts") for each in differences(given, other))


def test_their_order_is_not() -> None:
    volumes = [Volume(source=f"/{name}", target=f"/mnt/{name}") for name in "ab"]
    assert document(*volumes).key == document(*reversed(volumes)).key


def test_a_start_whose_volumes_held_something_else_is_told_from_another_one() -> None:
    given = document(Volume(source="/srv", target="/mnt"))
    assert only_content_differs(
        given, document(Volume(source="/srv", target="/mnt"), content="2 names, 22")
    )
    for other in (
        given,
        document(),
        document(Volume(source="/srv", target="/mnt", read_only=True), content="2 names, 22"),
    ):
        assert not only_content_differs(given, other)
