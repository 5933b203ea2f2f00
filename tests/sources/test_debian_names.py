"""Debian images: what they can be called, and that a refresh makes others."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratoon.engine.sources.debian import Debian
from ratoon.engine.sources.resolve import resolve
from ratoon.errors import InvalidInput, NotFound

pytest_plugins = ["image_fixtures"]


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("debian", "debian:bookworm"),
        ("debian:trixie", "debian:trixie"),
        ("debian+git", "debian:bookworm+git"),
        ("debian:bullseye+git+curl", "debian:bullseye+curl+git"),
        ("debian+git+git+python3", "debian:bookworm+git"),
        ("debian+g++", "debian:bookworm+g++"),
        ("debian+g+++git", "debian:bookworm+g+++git"),
        ("debian+libstdc++6+g++-12", "debian:bookworm+g++-12+libstdc++6"),
        ("debian+7zip", "debian:bookworm+7zip"),
    ],
)
def test_names(reference: str, name: str, cache: Path) -> None:
    image = resolve(reference)
    assert image.name == name
    assert resolve(name) == image


def test_packages_are_told_apart() -> None:
    debian = Debian.parse("debian+g+++libstdc++6+git")
    assert debian is not None
    assert debian.packages == ("g++", "git", "libstdc++6")


@pytest.mark.parametrize(
    "reference",
    ["debian+", "debian++", "debian+Git", "debian+a b", "debian+-x", "debian+git,curl", "debian+x"],
)
def test_what_can_be_no_package_is_refused(reference: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be the name of a package"):
        resolve(reference)


@pytest.mark.parametrize("reference", ["debian:", "debian:12", "debian:potato", "debian:../x+git"])
def test_other_suites_there_are_none(reference: str) -> None:
    with pytest.raises((NotFound, InvalidInput)):
        resolve(reference)


def test_a_refresh_makes_another_one_which_stays(cache: Path) -> None:
    first = resolve("debian+git")
    again = resolve("debian+git", refresh=True)
    assert again.digest != first.digest
    assert resolve("debian:bookworm+git") == again
    assert resolve("debian").digest not in (first.digest, again.digest)
