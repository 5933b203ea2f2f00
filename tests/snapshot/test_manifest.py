"""What a manifest may say, and what happens to one that says something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ratoon.errors import ChainMismatch, Corrupt, Incompatible, InvalidInput, RatoonError
from ratoon.store.snapshot.manifest import Manifest, check_tag, decode, encode
from ratoon.store.snapshot.store import Store
from small_snapshots import digest, publish


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The manifest of a snapshot with a parent and a grandparent."""
    store = Store.open(tmp_path_factory.mktemp("home"))
    base = publish(store, "base")
    return publish(store, "child", parent=publish(store, "middle", parent=base)).manifest


def decoded(document: object) -> Manifest:
    raw = json.dumps(document).encode()
    return decode(raw, digest(raw), label="the manifest")


def dumped(manifest: Manifest) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(encode(manifest))
    return document


def test_a_manifest_survives_the_round_trip(child: Manifest) -> None:
    raw = encode(child)
    assert decode(raw, digest(raw), label="") == child
    assert encode(decode(raw, digest(raw), label="")) == raw
    assert raw.startswith(b'{\n  "format": 2,\n  "tag": "child",\n')


def test_an_unknown_format_names_both_versions(child: Manifest) -> None:
    with pytest.raises(Incompatible, match=r"the manifest: format 3, .* format 2"):
        decoded({**dumped(child), "format": 3, "news": []})


def test_a_wrong_digest_is_found_before_anything_else(child: Manifest) -> None:
    with pytest.raises(Corrupt, match="the manifest: its content does not match"):
        decode(b"{}", digest(b""), label="the manifest")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tag": "other"}, "last layer is not the snapshot's own"),
        ({"id": "0" * 32}, "last layer is not the snapshot's own"),
        ({"memory_root": "0" * 64}, "last layer is not the snapshot's own"),
        ({"disk_root": "0" * 64}, "disk root"),
        ({"parent": None}, "but no parent"),
        ({"layers": []}, "layers: "),
        ({"tag": "../x"}, "tag: "),
        ({"surprise": 1}, "surprise: "),
        ({"created_at_unix": "now"}, "created_at_unix: "),
        ({"stages": {"pause": -1}}, "stages.pause: "),
        ({"format": True}, "names no format"),
        ({"format": "1"}, "names no format"),
    ],
)
def test_contradictions_are_named(child: Manifest, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(Corrupt, match=f"the manifest: .*{reason}"):
        decoded({**dumped(child), **change})


@pytest.mark.parametrize(
    ("field", "value"),
    [("ram_bytes", 4095), ("ram_bytes", 0), ("vcpus", 0), ("accelerator", "xen"), ("machine", "q")],
)
def test_an_impossible_machine_is_refused(child: Manifest, field: str, value: object) -> None:
    document = dumped(child)
    document["machine"][field] = value
    with pytest.raises(Corrupt, match=rf"machine\.{field}: "):
        decoded(document)


def test_a_parent_that_is_not_the_layer_below_is_refused(child: Manifest) -> None:
    document = dumped(child)
    document["parent"]["tag"] = "stranger"
    with pytest.raises(Corrupt, match="not its parent's"):
        decoded(document)
    document["layers"] = document["layers"][-1:]
    document["disk_root"] = dumped(child)["disk_root"]
    with pytest.raises(Corrupt, match="disk root"):
        decoded(document)


def test_a_chain_that_does_not_fit_names_both_roots(child: Manifest) -> None:
    assert child.parent
    document = dumped(child)
    document["parent"]["memory_root"] = "f" * 64
    with pytest.raises(ChainMismatch) as caught:
        decoded(document)
    assert caught.value.expected == "f" * 64
    assert caught.value.found == child.parent.memory_root
    assert "f" * 64 in str(caught.value)
    assert child.parent.memory_root in str(caught.value)
    assert "child" in str(caught.value)


def test_a_contradicting_manifest_cannot_be_made(child: Manifest) -> None:
    with pytest.raises(ValidationError):
        Manifest(**{**dict(child), "tag": "other"})


@pytest.mark.parametrize("tag", ["a", "A-b_9", "x" * 64, "-"])
def test_good_tags(tag: str) -> None:
    check_tag(tag)


@pytest.mark.parametrize(
    "tag",
    ["", ".", "..", "../x", "a/b", "/a", "x" * 65, "a\n", "a b", "a\0", "ä", "\u0661", ".hidden"],
)
def test_hostile_tags_are_refused(tmp_path: Path, tag: str) -> None:
    with pytest.raises(InvalidInput, match="1 to 64 letters") as caught:
        check_tag(tag)
    assert repr(tag) in str(caught.value)
    store = Store.open(tmp_path)
    for use in (store.get, store.delete, store.info, store.dependents):
        with pytest.raises(InvalidInput):
            use(tag)
    with pytest.raises(InvalidInput), store.stage(tag):
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_surprise_decode(raw: bytes) -> None:
    with pytest.raises(RatoonError):
        decode(raw, digest(raw), label="the manifest")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_value_in_any_place_surprises_decode(child: Manifest, data: st.DataObject) -> None:
    document = dumped(child)
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
        else:
            break
    place[key] = data.draw(JSON)
    try:
        manifest = decoded(document)
    except RatoonError:
        return
    raw = encode(manifest)
    assert decode(raw, digest(raw), label="") == manifest


def test_deep_nesting_and_huge_numbers_are_refused() -> None:
    for raw in (b"[" * 100_000, b'{"format":' + b"9" * 10_000 + b"}", b'{"format":1e999}'):
        with pytest.raises(RatoonError):
            decode(raw, digest(raw), label="the manifest")
