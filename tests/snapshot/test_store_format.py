"""A store says what format it has; where it does not, nobody guesses."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratoon.errors import Corrupt, Incompatible
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.store_format import FORMAT
from small_snapshots import publish


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one snapshot."""
    store = Store.open(tmp_path / "home")
    publish(store, "t")
    return store


def names(store: Store) -> list[str]:
    return sorted(str(path.relative_to(store.home)) for path in store.home.rglob("*"))


def refused(store: Store, error: type[Corrupt | Incompatible], match: str) -> None:
    before = names(store)
    with pytest.raises(error, match=match):
        Store.open(store.home)
    assert names(store) == before


def test_a_new_store_says_its_format(tmp_path: Path) -> None:
    home = tmp_path / "home"
    Store.open(home)
    assert (home / "store.json").read_text() == f'{{"format":{FORMAT}}}\n'
    Store.open(home)


def test_a_home_that_is_there_but_empty_becomes_a_store(tmp_path: Path) -> None:
    for name in ("snapshots", "staging", "images", "sandboxes", "templates"):
        (tmp_path / name).mkdir()
    (tmp_path / ".store.json.1.tmp").touch()  # killed before it had its name
    Store.open(tmp_path)
    assert (tmp_path / "store.json").exists()


@pytest.mark.parametrize(
    ("found", "age"), [(2, "newer"), (1 << 70, "newer"), (0, "older"), (-1, "older")]
)
def test_another_format_is_refused_and_both_are_named(store: Store, found: int, age: str) -> None:
    (store.home / "store.json").write_text(f'{{"format": {found}}}')
    said = f"store.json: format {found}, but this Ratoon uses format {FORMAT}; .* {age} Ratoon"
    refused(store, Incompatible, said)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "garbage",
        "1",
        "null",
        "[1]",
        "{}",
        '{"format": "1"}',
        '{"format": 1.5}',
        '{"format": true}',
        '{"format": null}',
        '{"format": 1, "more": 1}',
        '{"format": 1',
        "\0" * 13,
        "[" * 100_000,
    ],
)
def test_garbage_is_refused(store: Store, content: str) -> None:
    (store.home / "store.json").write_text(content)
    refused(store, Corrupt, r"store.json: not what Ratoon wrote; restore it")


@pytest.mark.parametrize("where", ["snapshots", "staging", "images", "sandboxes"])
def test_a_store_that_has_lost_its_format_is_not_guessed(tmp_path: Path, where: str) -> None:
    store = Store.open(tmp_path / "home")
    (store.home / "store.json").unlink()
    (store.home / where / "something").mkdir()
    refused(store, Incompatible, f"store.json is missing, but there is .*/{where}/something")
    assert not (store.home / "store.json").exists()


def test_the_lost_format_can_be_restored(store: Store) -> None:
    raw = (store.home / "store.json").read_bytes()
    (store.home / "store.json").unlink()
    refused(store, Incompatible, "the store's format is unknown")
    (store.home / "store.json").write_bytes(raw)
    assert Store.open(store.home).get("t")
