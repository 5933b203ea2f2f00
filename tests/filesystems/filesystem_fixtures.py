"""Real file systems, each made in a sparse file and mounted for the tests of one module.

Where that cannot be, the tests are skipped and say what is missing. Not a conftest: the type
checker takes one module of a name.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from loop_volumes import Mount, Volume

from ratoon.bench.loop_mounts import KINDS, mounted, what_is_missing
from ratoon.errors import HostError
from ratoon.units import GIB


@pytest.fixture(scope="module")
def mount() -> Iterator[Mount]:
    volumes = []
    with ExitStack() as stack:

        def mount(kind: str, size: int) -> Volume:
            if missing := what_is_missing(kind):
                pytest.skip(f"no {kind} can be mounted: {missing}")
            try:
                volume = Volume(kind, stack.enter_context(mounted(kind, size)))
            except HostError as error:  # a kernel without it, or a container
                pytest.skip(str(error))
            volumes.append(volume)
            return volume

        yield mount
    deadline = time.monotonic() + 10
    while left := [volume for volume in volumes if is_attached(volume)]:
        assert time.monotonic() < deadline, f"loop devices were left behind: {left}"
        time.sleep(0.1)  # the kernel may take a moment


def is_attached(volume: Volume) -> bool:
    listed = subprocess.run(["losetup", "--list"], capture_output=True, text=True, check=True)
    return str(volume.root.parent) in listed.stdout


@pytest.fixture(scope="module", params=KINDS)
def volume(request: pytest.FixtureRequest, mount: Mount) -> Volume:
    """One file system of each kind in turn, 1 GiB."""
    return mount(request.param, GIB)


@pytest.fixture
def place(volume: Volume, request: pytest.FixtureRequest) -> Path:
    """A new directory on `volume`, for one test."""
    path = volume.root / str(request.node.name)
    path.mkdir()
    return path
