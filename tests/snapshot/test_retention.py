"""The plan of what to keep: against a plain model, and against what a deletion really frees."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon.errors import HasDependents, InvalidInput, NotFound
from ratoon.store.memory.image import ImageStore
from ratoon.store.snapshot.compress import rewrite_layers
from ratoon.store.snapshot.inventory import take_inventory
from ratoon.store.snapshot.retention import Inventory, Member, Plan, Rules, make_plan
from ratoon.store.snapshot.snapshot import Snapshot, link_snapshot
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.usage import usage
from small_snapshots import make_image, publish, write_snapshot

NOW = 1_800_000_000.0
HOUR = 3600.0


@st.composite
def stocks(draw: st.DrawFn) -> Inventory:
    """Forests with any ages, users, and bytes that any of them share."""
    count = draw(st.integers(1, 12))
    members: list[Member] = []
    for number in range(count):
        parent = draw(st.sampled_from([None, *members])) if members else None
        members.append(
            Member(
                tag=f"t{number}",
                id=f"id{number}",
                parent=parent.id if parent else None,
                base=parent.base if parent else f"id{number}",
                base_tag=parent.base_tag if parent else f"t{number}",
                created_at_unix=NOW - draw(st.integers(0, 20)) * HOUR,
                roots=frozenset(draw(st.sets(st.sampled_from(["r0", "r1", "r2"]), max_size=2))),
                users=draw(st.sampled_from([(), (), (), ("sandbox sb-0",)])),
            )
        )
    # A deletion that was forced: the base is gone, or what stands between.
    gone = draw(st.sets(st.sampled_from(members), max_size=3))
    left = tuple(each for each in members if each not in gone) or tuple(members)
    holders = [f"snapshot/{each.tag}" for each in left]
    holders += ["image/r0", "image/r1", "image/r2", "sandbox/sb-0", "other", "outside"]
    charges = draw(
        st.dictionaries(
            st.frozensets(st.sampled_from(holders), min_size=1, max_size=5),
            st.integers(1, 1000),
            max_size=15,
        )
    )
    return Inventory(left, charges)


rules = st.builds(
    Rules,
    keep_last=st.none() | st.integers(1, 4),
    keep_within=st.none() | st.integers(0, 12).map(lambda hours: hours * HOUR),
    max_bytes=st.none() | st.integers(0, 4000),
    keep=st.lists(st.sampled_from(["t?", "t1*", "*0", "none*"]), max_size=1).map(tuple),
).filter(lambda each: (each.keep_last, each.keep_within, each.max_bytes) != (None, None, None))


def held(inventory: Inventory, tags: set[str]) -> int:
    names = {f"snapshot/{tag}" for tag in tags}
    return sum(size for holders, size in inventory.charges.items() if holders & names)


def freed(inventory: Inventory, tags: set[str]) -> int:
    """What becomes free when all of these go, from the definition."""
    roots = {root for each in inventory.members if each.tag not in tags for root in each.roots}
    going = {root for each in inventory.members if each.tag in tags for root in each.roots} - roots
    gone = {f"snapshot/{tag}" for tag in tags} | {f"image/{root}" for root in going}
    return sum(size for holders, size in inventory.charges.items() if holders <= gone)


def kept(plan: Plan) -> set[str]:
    return {verdict.tag for verdict in plan.verdicts if verdict.keep}


@given(stocks(), rules)
def test_what_a_plan_promises(inventory: Inventory, chosen: Rules) -> None:
    plan = make_plan(inventory, chosen, NOW)
    stays, goes = kept(plan), [verdict.tag for verdict in plan.deletions]
    tags = {each.tag for each in inventory.members}
    assert stays | set(goes) == tags
    assert len(plan.verdicts) == len(tags)
    assert all(verdict.reason for verdict in plan.verdicts)
    by_id = {each.id: each for each in inventory.members}
    by_tag = {each.tag: each for each in inventory.members}

    # What has dependents goes after them, or not at all.
    for tag in goes:
        children = {each.tag for each in inventory.members if each.parent == by_tag[tag].id}
        assert children <= set(goes[: goes.index(tag)])

    # What a rule keeps is kept.
    lineages: dict[str, list[Member]] = {}
    for each in sorted(inventory.members, key=lambda each: (-each.created_at_unix, each.id)):
        lineages.setdefault(each.base, []).append(each)
    for members in lineages.values():
        ages = sorted((each.created_at_unix for each in members), reverse=True)
        last = chosen.keep_last or (1 if chosen.max_bytes is not None else 0)
        for each in members:
            newer = sum(age > each.created_at_unix for age in ages)
            same = ages.count(each.created_at_unix)
            must = bool(each.users) or newer + same <= last
            within = chosen.keep_within
            must |= within is not None and each.created_at_unix >= NOW - within
            if must:
                assert each.tag in stays, each

    # What is kept has a reason that holds.
    for verdict in plan.verdicts:
        if verdict.keep and "was made from it" in verdict.reason:
            child = by_tag[verdict.reason.split(" ")[0]]
            assert child.tag in stays
            assert by_id[child.parent or ""].tag == verdict.tag

    # The bytes are those of the definition.
    assert plan.freed == freed(inventory, set(goes))
    for number, verdict in enumerate(plan.deletions):
        before = freed(inventory, set(goes[:number]))
        assert verdict.frees == freed(inventory, set(goes[: number + 1])) - before
    for budget, members in zip(
        sorted(plan.budgets, key=lambda each: each.lineage),
        sorted(lineages.values(), key=lambda each: each[0].base_tag),
        strict=True,
    ):
        names = {each.tag for each in members}
        assert budget.before == held(inventory, names)
        assert budget.after == held(inventory, names & stays)


@given(stocks(), rules)
def test_a_budget_takes_no_more_than_it_must(inventory: Inventory, chosen: Rules) -> None:
    plan = make_plan(inventory, chosen, NOW)
    if chosen.max_bytes is None:
        return
    without = make_plan(
        inventory, replace(chosen, max_bytes=None, keep_last=chosen.keep_last or 1), NOW
    )
    assert kept(without) <= kept(plan), "a budget keeps the rest for as long as it can"
    bases = {each.tag: each.base for each in inventory.members}
    for budget in plan.budgets:
        base = next(each.base for each in inventory.members if each.base_tag == budget.lineage)
        gone = [each.tag for each in plan.deletions if bases[each.tag] == base]
        if gone:
            last_but_one = {tag for tag in bases if bases[tag] == base} - set(gone[:-1])
            assert held(inventory, last_but_one) > chosen.max_bytes, "the last one had to go"
        if budget.excess:
            spared = [
                each.tag
                for each in plan.verdicts
                if each.keep and bases[each.tag] == base and "within the budget" in each.reason
            ]
            assert not spared


@given(stocks(), rules)
def test_a_plan_that_was_carried_out_leaves_nothing_to_do(
    inventory: Inventory, chosen: Rules
) -> None:
    stays = kept(make_plan(inventory, chosen, NOW))
    left = Inventory(
        tuple(each for each in inventory.members if each.tag in stays),
        {
            holders: size
            for holders, size in inventory.charges.items()
            if any(holder.removeprefix("snapshot/") in stays for holder in holders)
        },
    )
    assert not make_plan(left, chosen, NOW).deletions


@given(stocks(), rules, st.data())
def test_one_lineage_alone(inventory: Inventory, chosen: Rules, data: st.DataObject) -> None:
    picked = data.draw(st.sampled_from(inventory.members))
    plan = make_plan(inventory, replace(chosen, lineage=picked.tag), NOW)
    members = {each.tag for each in inventory.members if each.base == picked.base}
    assert {verdict.tag for verdict in plan.verdicts} == members
    whole = make_plan(inventory, chosen, NOW)
    assert {each.tag for each in plan.deletions} == members - kept(whole)


def chain(*ages: float) -> Inventory:
    """t0 <- t1 <- …, so many hours old."""
    members = [
        Member(f"t{n}", f"i{n}", f"i{n - 1}" if n else None, "i0", "t0", NOW - age * HOUR)
        for n, age in enumerate(ages)
    ]
    return Inventory(tuple(members), {frozenset({f"snapshot/{each.tag}"}): 100 for each in members})


def test_a_chain_is_kept_up_to_its_newest() -> None:
    plan = make_plan(chain(3, 2, 1), Rules(keep_last=1), NOW)
    assert not plan.deletions
    reasons = {verdict.tag: verdict.reason for verdict in plan.verdicts}
    assert reasons == {
        "t2": "one of the last 1 of its lineage",
        "t1": "t2 was made from it",
        "t0": "t1 was made from it",
    }


def test_a_budget_that_cannot_be_held_says_by_how_much() -> None:
    (budget,) = make_plan(chain(3, 2, 1), Rules(max_bytes=120), NOW).budgets
    assert (budget.before, budget.after, budget.excess) == (300, 300, 180)


def test_a_budget_takes_the_oldest_branches_first() -> None:
    inventory = chain(9)
    branches = [
        Member(f"b{n}", f"j{n}", "i0", "i0", "t0", NOW - age * HOUR)
        for n, age in enumerate((5, 8, 2, 7))
    ]
    charges = {**inventory.charges, **{frozenset({f"snapshot/{b.tag}"}): 100 for b in branches}}
    plan = make_plan(Inventory((*inventory.members, *branches), charges), Rules(max_bytes=300), NOW)
    assert [verdict.tag for verdict in plan.deletions] == ["b1", "b3"]
    assert plan.freed == 200
    spared = {verdict.tag: verdict.reason for verdict in plan.verdicts if verdict.keep}
    assert spared["b0"] == "its lineage is within the budget"
    assert spared["b2"] == "the newest of its lineage"


@pytest.mark.parametrize(
    ("chosen", "error"),
    [
        (Rules(), InvalidInput),
        (Rules(keep=("*",)), InvalidInput),
        (Rules(keep_last=0), InvalidInput),
        (Rules(keep_within=-1), InvalidInput),
        (Rules(max_bytes=-1), InvalidInput),
        (Rules(keep_last=1, keep=("t9",)), NotFound),
        (Rules(keep_last=1, lineage="t9"), NotFound),
    ],
)
def test_rules_that_cannot_be_meant(chosen: Rules, error: type[Exception]) -> None:
    with pytest.raises(error):
        make_plan(chain(1), chosen, NOW)


def test_a_circle_of_parents_is_left_alone() -> None:
    one, other = chain(2, 1).members
    inventory = Inventory((replace(one, parent=other.id), other), {})
    assert not make_plan(inventory, Rules(keep_within=0), NOW).deletions


# On a store --------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """base, on it a, b and c, and a1 on a; another base; a and b have images.

    c and other are new.
    """
    store = Store.open(tmp_path / "home")
    base = publish(store, "base", {number: number + 1 for number in range(100)})
    a = publish(store, "a", {number: number + 200 for number in range(20)}, base)
    publish(store, "a1", {2: 600}, a)
    b = publish(store, "b", {number: number + 300 for number in range(30)}, base)
    publish(store, "same", {}, b)
    publish(store, "c", {1: 1}, base, created_at_unix=time.time())
    publish(store, "other", {1: 1}, created_at_unix=time.time())
    for snapshot in (a, b):
        make_image(store, snapshot)
    return store


def carry_out(store: Store, plan: Plan) -> int:
    """Delete as the engine does; how many bytes became free."""
    before = usage(store).total
    images = ImageStore(store.images)
    for verdict in plan.deletions:
        root = store.get(verdict.tag).manifest.memory_root
        store.delete(verdict.tag)
        left = [each.manifest.memory_root for each in store.list() if isinstance(each, Snapshot)]
        if root not in left:
            images.remove(root)
    return before - usage(store).total


def plain(store: Store) -> None:
    """As it is."""


def compressed(store: Store) -> None:
    rewrite_layers(store, "compressed")


def with_a_sandbox(store: Store) -> None:
    """The layers of a are a sandbox's too, which no manifest tells of any more."""
    twin = link_snapshot(store.get("a"), store.sandboxes / "sb-0-0")
    (twin.path / "manifest.json").unlink()


@pytest.mark.parametrize("prepare", [plain, compressed, with_a_sandbox])
@pytest.mark.parametrize(
    ("chosen", "goes"),
    [
        (Rules(keep_last=1), ["a1", "a", "same", "b"]),
        (Rules(keep_last=1, keep=("a",)), ["a1", "same", "b"]),
        (Rules(keep_within=HOUR, keep=("s*",)), ["a1", "a"]),
        (Rules(keep_last=1, lineage="other"), []),
    ],
)
def test_what_is_planned_is_what_becomes_free(
    store: Store, chosen: Rules, goes: list[str], prepare: Callable[[Store], None]
) -> None:
    prepare(store)
    plan = make_plan(take_inventory(store), chosen, time.time())
    assert sorted(verdict.tag for verdict in plan.deletions) == sorted(goes)
    assert carry_out(store, plan) == plan.freed
    assert (plan.freed > 0) == bool(goes)


def test_what_sandboxes_stand_on_is_kept(store: Store) -> None:
    parent = store.sandboxes / "sb-1-1" / "parent"
    parent.parent.mkdir()
    link_snapshot(store.get("a"), parent)
    dozing = store.sandboxes / "sb-2-2" / "parent"
    dozing.parent.mkdir()
    with store.stage("dozing") as staging:
        manifest = write_snapshot(store, staging, {7: 7}, store.get("b"), anonymous=True)
        link_snapshot(staging.publish(manifest), dozing)
    store.delete("dozing")
    plan = make_plan(
        take_inventory(store, {"same": "workspace w"}), Rules(keep_last=1), time.time()
    )
    reasons = {verdict.tag: verdict.reason for verdict in plan.verdicts if verdict.keep}
    assert reasons["a"] == "used by sandbox sb-1-1"
    assert reasons["b"] == "used by sandbox sb-2-2"
    assert reasons["same"] == "used by workspace w"
    assert [verdict.tag for verdict in plan.deletions] == ["a1"]


def test_what_cannot_be_read_is_left_alone(store: Store) -> None:
    (store.snapshots / "a1" / "manifest.b3").write_bytes(b"0" * 64 + b"\n")
    plan = make_plan(take_inventory(store), Rules(keep_last=1), time.time())
    (damaged,) = (verdict for verdict in plan.verdicts if verdict.tag == "a1")
    assert damaged.keep
    assert "damaged" in damaged.reason


def test_a_lineage_outlives_its_base(store: Store) -> None:
    store.delete("base", force=True)
    plan = make_plan(take_inventory(store), Rules(keep_last=1, lineage="a"), time.time())
    assert {verdict.lineage for verdict in plan.verdicts} == {"base"}
    assert {verdict.tag for verdict in plan.verdicts} == {"a", "a1", "b", "same", "c"}


def test_a_plan_never_forces(store: Store) -> None:
    """Should somebody branch meanwhile, the deletion is refused as any other is."""
    plan = make_plan(take_inventory(store), Rules(keep_last=1), time.time())
    publish(store, "meanwhile", {}, store.get("a1"))
    with pytest.raises(HasDependents):
        carry_out(store, plan)
