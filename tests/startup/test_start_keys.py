"""Keys of starts: what makes another one, and whether a miss is told by its true reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon.engine.startup import key
from ratoon.engine.startup.key import Booted, Difference, Started, differences, unfit
from ratoon.machine.guest.shared import wire
from ratoon.machine.vmm import command

TEXT = st.text(max_size=8)
NUMBERS = st.integers(1, 1 << 40)
BOOTED = st.builds(
    Booted,
    image=TEXT,
    kernel=TEXT,
    kernel_words=st.lists(TEXT, max_size=3).map(tuple),
    initramfs=TEXT,
    agent_protocol=NUMBERS,
    ram_bytes=NUMBERS,
    vcpus=NUMBERS,
    disk_bytes=NUMBERS,
    machine=TEXT,
    devices=st.lists(TEXT, max_size=3).map(tuple),
    qemu_version=TEXT,
    accelerator=st.sampled_from(["tcg", "kvm"]),
    cpu=TEXT,
    host_cpu=st.none() | TEXT,
)
STARTED = st.builds(
    Started,
    booted=BOOTED,
    argv=st.lists(TEXT, max_size=3).map(tuple),
    environment=st.dictionaries(TEXT, TEXT, max_size=3),
    user=st.none() | TEXT,
    workdir=st.none() | TEXT,
    network=TEXT,
    mounts=st.just({}),
    health=st.fixed_dictionaries({"kind": TEXT, "url": TEXT}),
)
FIELDS = [
    *(("image", "kernel", "initramfs", "machine", "qemu_version", "cpu", "host_cpu")),
    *("agent_protocol", "ram_bytes", "vcpus", "disk_bytes", "devices", "accelerator"),
    "kernel_words",
]
OTHERS: dict[str, Any] = {
    "devices": ("another",),
    "kernel_words": ("another",),
    "accelerator": "kvm",
}


@given(STARTED)
def test_equal_documents_have_the_same_key(document: Started) -> None:
    again = Started.model_validate_json(document.model_dump_json())
    assert again == document
    assert again.key == document.key
    assert differences(document, again) == ()


@given(BOOTED, st.sampled_from(FIELDS))
def test_each_field_of_a_boot_makes_another_key_and_is_the_one_named(
    document: Booted, field: str
) -> None:
    value = getattr(document, field)
    other = OTHERS.get(field, value + 1 if isinstance(value, int) else f"{value}+")
    if other == value:
        other = "tcg" if field == "accelerator" else ("another", "one")
    changed = document.model_copy(update={field: other})
    assert changed.key != document.key
    assert [each.field for each in differences(document, changed)] == [field]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("argv", ("x", "y", "z", "more"), "argv"),
        ("user", "somebody else", "user"),
        ("workdir", "/somewhere/else", "workdir"),
        ("network", "allow:198.51.100.7:443", "network"),
    ],
)
@given(document=STARTED)
def test_each_field_of_a_start_does_too(
    document: Started, field: str, value: Any, named: str
) -> None:
    changed = document.model_copy(update={field: value})
    assert changed.key != document.key
    assert [each.field for each in differences(document, changed)] == [named]


@given(STARTED, st.text(min_size=9, max_size=12))
def test_a_variable_is_named_by_its_own_name(document: Started, name: str) -> None:
    environment = {**document.environment, name: "1"}
    changed = document.model_copy(update={"environment": environment})
    assert changed.key != document.key
    (found,) = differences(document, changed)
    assert (found.field, found.one, found.other) == (f"environment.{name}", None, "1")


@given(STARTED)
def test_what_a_start_stands_on_is_named_within_it(document: Started) -> None:
    below = document.booted.model_copy(update={"qemu_version": "another"})
    changed = document.model_copy(update={"booted": below})
    assert changed.key != document.key
    assert [each.field for each in differences(document, changed)] == ["booted.qemu_version"]


def test_what_another_qemu_made_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key, "qemu_version", lambda: "10.0.2")
    here = Booted(
        image="sha256:1",
        kernel="k",
        kernel_words=(),
        initramfs="i",
        agent_protocol=wire.VERSION,
        ram_bytes=1,
        vcpus=1,
        disk_bytes=1,
        machine=command.MACHINE,
        devices=command.DEVICES,
        qemu_version="10.0.2",
        accelerator="tcg",
        cpu="max",
        host_cpu=None,
    )
    assert unfit(here) == ()
    monkeypatch.setattr(key, "qemu_version", lambda: "11.0.0")
    (found,) = unfit(here)
    assert str(found) == "qemu_version is 10.0.2 there, 11.0.0 here"


@given(st.text(max_size=300), st.text(max_size=200), st.text(max_size=200))
def test_of_long_values_what_differs_is_shown(both: str, one: str, other: str) -> None:
    words = str(Difference("cpu", f"{both}1{one}", f"{both}2{other}"))
    left, _, right = words.removeprefix("cpu is ").removesuffix(" here").partition(" there, ")
    assert left != right
    assert len(words) < 200


def test_long_values_are_cut_on_both_sides() -> None:
    words = str(Difference("cpu", "x" * 1000 + "one", "x" * 1000 + "y" * 100))
    alike = "…" + "x" * 20
    assert words == f"cpu is {alike}one there, {alike}{'y' * 59}… here"
    assert str(Difference("cpu", "short", None)) == "cpu is short there, nothing here"
