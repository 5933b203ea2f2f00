"""A program in QEMU's place, started by the same code, gets nothing but what the documents list."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ratoon.jail import cell
from ratoon.jail.attack.expected import EXPECTED, EXPECTED_OF_OWN_ID
from ratoon.jail.steps import STEPS
from ratoon.machine.vmm.attack import OWN, Attempted, attack

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make cells")

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"


@pytest.fixture(scope="module")
async def found() -> list[Attempted]:
    return await attack()


async def test_what_it_gets(found: list[Attempted]) -> None:
    """Of others and of the host; what its work takes it has."""
    assert [each for each in found if each.is_surprise] == []
    assert not [each for each in found if each.how.startswith("not tried")]
    got = {each.name for each in found if each.got == "allowed"}
    assert len([each for each in found if each.group != OWN]) > 300
    assert {*EXPECTED} <= got, "what is listed it does not get"
    assert {"read its layers", "write its overlay", "read the memory image by its path"} <= got


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ("process, IPC and host-name namespaces", "open others as pidfd"),
        ("no new privileges", "drop no_new_privs"),
        ("a filter for system calls", "run without a system call filter"),
    ],
)
async def test_a_jail_that_lacks_a_step(
    step: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows. Others hold back the same twice, or nothing starts without them."""
    left = tuple(each for each in STEPS if each.name != step)
    assert len(left) == len(STEPS) - 1
    monkeypatch.setattr(cell, "STEPS", left)
    assert name in {each.name for each in await attack() if each.is_surprise}


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("what the stand-in is allowed", EXPECTED),
        ("what it is allowed besides", EXPECTED_OF_OWN_ID),
    ],
)
def test_the_documents_list_it(heading: str, expected: dict[str, str]) -> None:
    table = SECURITY.read_text().partition(f"| {heading} |")[2]
    rows = [row.split("|")[1:3] for row in table.partition("\n\n")[0].splitlines()[2:]]
    listed = {name.strip(): why.strip() for name, why in rows}
    last = ""
    for name, why in listed.items():
        last = listed[name] = last if why == "the same" else why
    assert listed == expected


def test_what_is_a_surprise() -> None:
    """What is not listed, and what is broken, for it says nothing."""

    def is_one(name: str, got: str, how: str = "EPERM", group: str = "files") -> bool:
        return Attempted(group, name, got, how).is_surprise  # type: ignore[arg-type]

    assert is_one("open the moon", "allowed")
    assert is_one("open the moon", "denied", "fault in the stand-in: ValueError: no moon")
    assert not is_one("open the moon", "denied")
    assert not is_one("open the moon", "allowed", group=OWN)
    assert not is_one("list host directories", "allowed")
