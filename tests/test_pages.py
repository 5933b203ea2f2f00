"""What the documents name is there: files, headings, modules, tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ratoon
from ratoon.version import __version__

ROOT = Path(__file__).parents[1]
SOURCE = Path(ratoon.__file__).parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.joinpath("docs").rglob("*.md")])

LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
#: A module, a package or a test, as the documents write it.
_TOPS = "api|bench|cli|client|daemon|engine|machine|store|tests|scripts|examples"
CODE = re.compile(rf"`((?:[a-z_]+/)*[a-z_]+\.py|(?:{_TOPS})/[a-z_/]*)`")


def text_of(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> Iterator[str]:
    """What its headings can be linked by."""
    for heading in re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        yield words.replace(" ", "-")


def exists(name: str) -> bool:
    """Whether the end of some module's, test's or script's path is `name`."""
    places = (SOURCE, ROOT / "tests", ROOT / "scripts", ROOT / "examples")
    if any((place / name).exists() for place in (*places, ROOT)):
        return True
    return "/" not in name and any(True for place in places for _ in place.rglob(name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(text_of(page)):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_are_named_are_there(page: Path) -> None:
    gone = sorted({name for name in CODE.findall(text_of(page)) if not exists(name)})
    assert gone == []


def test_the_changelog_is_of_this_version() -> None:
    """What is new is below its number; until it has one, all numbers are of older versions."""
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    numbers = [heading.split()[0] for heading in headings if heading != "Unreleased"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", number) for number in numbers)
    if headings[0] == "Unreleased":
        assert __version__ not in numbers
        released = numbers
    else:
        assert __version__ == numbers[0]
        released = numbers[1:]
    ours = _parts(__version__)
    assert all(_parts(number) < ours for number in released)
    assert "Unreleased" not in headings[1:]


def _parts(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
