"""Retention: which snapshots are to be kept, and why; the others are to be deleted.

A lineage is a base and all that descends from it, whether the base is still there or not. In each:

1. What a rule keeps is kept: the newest `keep_last`, what is not older than `keep_within`, what
   `keep` names, and what somebody uses.
2. What a kept snapshot was made from is kept too, up to the base. To delete it would free next to
   nothing, as its layers would live on in what stands on them; and where that came from would be
   forgotten.
3. The rest goes; or, with `max_bytes`, only as much of it as the budget demands: again and again
   the oldest of those from which nothing that remains was made. The newest snapshot of a lineage
   stays in any case: it is where one would go on.

So a snapshot with dependents goes together with them, or not at all. To plan reads nothing and
changes nothing: the same inventory and rules give the same plan.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ratoon.errors import InvalidInput, NotFound


@dataclass(frozen=True)
class Rules:
    """What is to be kept of each lineage. At least one of the first three has to be there."""

    #: How many of the newest.
    keep_last: int | None = None
    #: What was made within so many seconds.
    keep_within: float | None = None
    #: How many bytes the snapshots of a lineage may hold, each inode and shared extent once.
    max_bytes: int | None = None
    #: Tags, or patterns of tags (`*`, `?`, `[…]`), that are kept whatever the other rules say.
    keep: tuple[str, ...] = ()
    #: Only the lineage of this tag; all if none.
    lineage: str | None = None


@dataclass(frozen=True)
class Member:
    """A snapshot, as far as it matters here; `base` is the id of its lowest layer.

    `roots` are those of all images that it may have, `users` says who needs it, in words.
    """

    tag: str
    id: str
    parent: str | None
    base: str
    base_tag: str
    created_at_unix: float
    roots: frozenset[str] = frozenset()
    users: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inventory:
    """All that a store has. `charges`: how many bytes have exactly these holders, see `usage`.

    `damaged` are the tags of snapshots that cannot be read; they are left alone.
    """

    members: tuple[Member, ...]
    charges: Mapping[frozenset[str], int]
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What is to become of a snapshot, and why.

    `frees` is how many bytes its deletion frees once those listed before it are gone, with its
    images. `lineage` is the tag of its base.
    """

    tag: str
    id: str
    lineage: str
    created_at_unix: float
    keep: bool
    reason: str
    frees: int = 0


@dataclass(frozen=True)
class Budget:
    """What the snapshots of a lineage hold, in bytes, without images: before, and afterwards."""

    lineage: str
    before: int
    after: int
    limit: int | None

    @property
    def excess(self) -> int:
        """By how much what has to be kept is more than it may."""
        return max(0, self.after - self.limit) if self.limit is not None else 0


@dataclass(frozen=True)
class Plan:
    """`verdicts`: what goes, in the order in which it can; then what is kept, the newest first."""

    verdicts: tuple[Verdict, ...]
    budgets: tuple[Budget, ...]

    @property
    def deletions(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if not verdict.keep)

    @property
    def freed(self) -> int:
        """How many bytes become free by it."""
        return sum(verdict.frees for verdict in self.verdicts)


def make_plan(inventory: Inventory, rules: Rules, now: float) -> Plan:
    """What is to be kept and what not; `now` is in seconds since 1970.

    InvalidInput: rules that say nothing, or what cannot be. NotFound: a tag in them.
    """
    _check(inventory, rules)
    lineages: defaultdict[str, list[Member]] = defaultdict(list)
    for member in sorted(inventory.members, key=_age, reverse=True):
        lineages[member.base].append(member)
    if rules.lineage is not None:
        base = next(each.base for each in inventory.members if each.tag == rules.lineage)
        lineages = defaultdict(list, {base: lineages[base]})
    holdings = _Holdings(inventory)
    deleted: list[tuple[Member, str, int]] = []
    kept: list[Verdict] = []
    budgets = []
    chosen = {member.id for members in lineages.values() for member in members}
    others = [member for member in inventory.members if member.id not in chosen]
    for members in lineages.values():
        reasons = _needed(members, others, dict(_reasons(members, rules, now)))
        held = _Held(holdings, members)
        before = held.total
        for member, why in _goes(members, others, reasons, rules, held):
            deleted.append((member, why, holdings.delete(member)))
        gone = {member.id for member, _, _ in deleted}
        left = [member for member in members if member.id not in gone]
        budgets.append(Budget(members[0].base_tag, before, held.total, rules.max_bytes))
        spared = "its lineage is within the budget"
        kept += [_verdict(each, True, reasons.get(each.id, spared)) for each in left]
    going = [_verdict(each, False, why, frees) for each, why, frees in deleted]
    damaged = () if rules.lineage else inventory.damaged
    kept += [Verdict(tag, "", "", 0, True, "damaged: see `ratoon check`") for tag in damaged]
    return Plan((*going, *kept), tuple(budgets))


def _check(inventory: Inventory, rules: Rules) -> None:
    if rules.keep_last is None and rules.keep_within is None and rules.max_bytes is None:
        raise InvalidInput("say what to keep: the last N, within a time, or at most so many bytes")
    if rules.keep_last is not None and rules.keep_last < 1:
        raise InvalidInput(f"cannot keep the last {rules.keep_last}: use 1 or more")
    if rules.keep_within is not None and rules.keep_within < 0:
        raise InvalidInput(f"cannot keep what is within {rules.keep_within} seconds: use 0 or more")
    if rules.max_bytes is not None and rules.max_bytes < 0:
        raise InvalidInput(f"cannot keep at most {rules.max_bytes} bytes: use 0 or more")
    tags = {*(member.tag for member in inventory.members), *inventory.damaged}
    named = [each for each in rules.keep if not set(each) & set("*?[")]
    for tag in (*named, *([rules.lineage] if rules.lineage is not None else ())):
        if tag not in tags or (tag == rules.lineage and tag in inventory.damaged):
            raise NotFound(f"no snapshot {tag}; `ratoon images` lists those there are")


def _age(member: Member) -> tuple[float, str]:
    return member.created_at_unix, member.id


def _reasons(members: Sequence[Member], rules: Rules, now: float) -> Iterator[tuple[str, str]]:
    """Which of a lineage, newest first, are kept for their own sake; the id, and why."""
    for number, member in enumerate(members):
        pattern = next((each for each in rules.keep if fnmatchcase(member.tag, each)), None)
        if member.users:
            yield member.id, f"used by {', '.join(member.users)}"
        elif pattern is not None:
            yield member.id, f"kept as {pattern}"
        elif rules.keep_last is not None and number < rules.keep_last:
            yield member.id, f"one of the last {rules.keep_last} of its lineage"
        elif rules.keep_within is not None and member.created_at_unix >= now - rules.keep_within:
            yield member.id, "not older than is to be kept"
        elif rules.max_bytes is not None and number == 0:
            yield member.id, "the newest of its lineage"


def _needed(
    members: Sequence[Member], others: Sequence[Member], reasons: dict[str, str]
) -> dict[str, str]:
    """`reasons`, and those of all that something was made from that is kept or not looked at."""
    by_id = {member.id: member for member in members}
    pending = [*others, *(by_id[each] for each in reasons)]
    while pending:
        child = pending.pop()
        parent = by_id.get(child.parent or "")
        if parent and parent.id not in reasons:
            reasons[parent.id] = f"{child.tag} was made from it"
            pending.append(parent)
    return reasons


def _goes(
    members: Sequence[Member],
    others: Sequence[Member],
    reasons: Mapping[str, str],
    rules: Rules,
    held: _Held,
) -> Iterator[tuple[Member, str]]:
    """What is to be deleted, each after all that was made from it; the oldest possible first."""
    left = list(members)
    children = Counter(member.parent for member in (*members, *others))
    why = "no rule keeps it"
    while True:
        if rules.max_bytes is not None:
            excess = held.total - rules.max_bytes
            if excess <= 0:
                return
            why = f"the oldest, and its lineage is {excess} bytes above its budget"
        leaves = [each for each in left if each.id not in reasons and not children[each.id]]
        if not leaves:
            return
        leaf = min(leaves, key=_age)
        left.remove(leaf)
        children[leaf.parent] -= 1
        held.drop(leaf)
        yield leaf, why


class _Holdings:
    """Who holds how many bytes, as snapshots are deleted one by one."""

    def __init__(self, inventory: Inventory) -> None:
        self._groups = [(set(holders), size) for holders, size in inventory.charges.items()]
        self._of: defaultdict[str, list[int]] = defaultdict(list)
        for number, (holders, _) in enumerate(self._groups):
            for holder in holders:
                self._of[holder].append(number)
        self._roots = Counter(root for member in inventory.members for root in member.roots)

    def of(self, member: Member) -> Sequence[tuple[int, int]]:
        """What a snapshot holds: the numbers of groups of bytes that have the same holders, sizes.

        Not its images.
        """
        numbers = self._of[f"snapshot/{member.tag}"]
        return [(number, self._groups[number][1]) for number in numbers]

    def delete(self, member: Member) -> int:
        """The bytes that become free, with the images that no other snapshot may have."""
        self._roots.subtract(member.roots)
        images = [f"image/{root}" for root in member.roots if not self._roots[root]]
        return sum(self._let_go(holder) for holder in (f"snapshot/{member.tag}", *images))

    def _let_go(self, holder: str) -> int:
        freed = 0
        for number in self._of[holder]:
            holders, size = self._groups[number]
            holders.discard(holder)
            freed += 0 if holders else size
        self._of[holder] = []
        return freed


class _Held:
    """How many bytes the snapshots of a lineage hold, each once, as they become fewer."""

    def __init__(self, holdings: _Holdings, members: Iterable[Member]) -> None:
        self._of = {member.id: holdings.of(member) for member in members}
        self._holders = Counter(number for held in self._of.values() for number, _ in held)
        sizes = {number: size for held in self._of.values() for number, size in held}
        self.total = sum(sizes.values())

    def drop(self, member: Member) -> None:
        """A snapshot is gone."""
        for number, size in self._of[member.id]:
            self._holders[number] -= 1
            self.total -= 0 if self._holders[number] else size


def _verdict(member: Member, keep: bool, reason: str, frees: int = 0) -> Verdict:
    return Verdict(
        member.tag, member.id, member.base_tag, member.created_at_unix, keep, reason, frees
    )
