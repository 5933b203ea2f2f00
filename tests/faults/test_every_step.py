"""Each operation on the store, killed or failed at each system call that changes the file system.

strace injects the faults: the real program, at real system calls, those of its children included.
Afterwards nothing is lost, nothing is half there, nothing is left lying about, and the same
operation succeeds when it is tried again.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from operations import MARK, OPERATIONS, PACK, build

from ratoon.jail.steps import FILES, ROOT
from ratoon.store.check.check import check_store
from ratoon.store.check.scrub import Slice
from ratoon.store.memory.image import ImageStore
from ratoon.store.snapshot.store import Store
from small_snapshots import contents

CALLS = (
    *("rename", "renameat2", "link", "linkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir"),
    *("write", "pwrite64", "writev", "pwritev", "copy_file_range", "ftruncate", "fallocate"),
    *("fsync", "fdatasync", "fchmod", "chmod", "fchown"),
)
#: What files of the store are called that were given to a program in a cell.
IN_CELL = f"{ROOT}/{FILES}/"
#: Of the steps of each operation and fault, how many `make test` tries; `make soak` tries all.
SLICE = 3
SEED = 20261121

FAULTS = {"kill": "signal=KILL", "ENOSPC": "error=ENOSPC", "EIO": "error=EIO"}


@dataclass(frozen=True)
class Outcome:
    """The tags that an operation adds to the store, and removes from it."""

    adds: frozenset[str] = frozenset()
    removes: frozenset[str] = frozenset()


OUTCOMES = {
    "publish": Outcome(adds=frozenset({"new"})),
    "delete": Outcome(removes=frozenset({"L1"})),
    "force": Outcome(removes=frozenset({"base"})),
    "cascade": Outcome(removes=frozenset({"base", "L1", "side"})),
    "image": Outcome(),
    "flatten": Outcome(adds=frozenset({"flat"})),
    "press": Outcome(),
    "receive": Outcome(adds=frozenset({"farther"})),
}


@dataclass(frozen=True)
class Step:
    """The `number`-th (from 1) system call of this name that the operation makes."""

    call: str
    number: int


def run(home: Path, operation: str, *strace: str) -> subprocess.CompletedProcess[str]:
    """Run an operation under strace, in a process of its own."""
    here = Path(__file__).parent
    program = [sys.executable, "-B", str(here / "operations.py"), str(home), operation]
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
    return subprocess.run(
        ["strace", "-qq", *strace, "--", *program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("prepared") / "home"
    build(home)
    return home


def copy_of(prepared: Path, target: Path) -> Path:
    """A store of its own with the same files and the same hard links among them."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", prepared, target], check=True)
    shutil.copy(prepared.with_name(PACK), target.with_name(PACK))
    return target


def steps(prepared: Path, operation: str, scratch: Path) -> list[Step]:
    """The system calls that change the file system, of the operation when nothing disturbs it.

    strace counts the calls of a name for each process by itself, from its start.
    """
    home = copy_of(prepared, scratch)
    trace = f"--trace={','.join(CALLS)},stat,newfstatat"
    done = run(home, operation, "-f", trace, "--decode-fds=path")
    assert done.returncode == 0, done.stderr
    counted: Counter[tuple[str, str]] = Counter()
    found: dict[Step, None] = {}
    begun = False
    for line in done.stderr.splitlines():
        begun = begun or f'"{MARK}"' in line
        if match := re.match(r"(?:\[pid +(\d+)\] )?(\w+)\(", line):
            pid, call = match[1] or "", match[2]
            counted[pid, call] += 1
            # Not the pipes and event counters by which a program talks to itself.
            if begun and call in CALLS and any(name in line for name in (str(home), IN_CELL)):
                found[Step(call, counted[pid, call])] = None
    assert len(found) >= 5
    return list(found)


def chosen(all_steps: list[Step], operation: str, fault: str, everything: bool) -> list[Step]:
    if everything:
        return all_steps
    return random.Random(f"{SEED} {operation} {fault}").sample(all_steps, SLICE)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_fault_at_any_step_loses_nothing(
    prepared: Path, tmp_path: Path, operation: str, fault: str, soak: bool
) -> None:
    missed = 0
    found = chosen(steps(prepared, operation, tmp_path / "trial"), operation, fault, soak)
    for step in found:
        home = copy_of(prepared, tmp_path / "home")
        inject = f"--inject={step.call}:{FAULTS[fault]}:when={step.number}"
        # qemu-img writes files by pwrite64, and by write wakes its own threads: not a disk's fault.
        follow = [] if step.call == "write" else ["-f"]
        done = run(home, operation, *follow, f"--trace={step.call}", inject)
        context = f"{operation}: {fault} at {step}: exit {done.returncode}\n{done.stderr[-3000:]}"
        # The threads of qemu-img share their calls out anew each time: there a step may not come.
        fired = "killed by SIGKILL" in done.stderr or "(INJECTED)" in done.stderr
        if fault == "kill" and fired:
            assert done.returncode in (-9, 137, 1), context  # 1: a child was killed
        else:
            assert done.returncode in (0, 1), context
        missed += not fired
        assert "Traceback" not in done.stderr, context
        assert_right(prepared, home, operation, context)
    assert missed <= len(found) / 3


def assert_right(prepared: Path, home: Path, operation: str, context: str) -> None:
    """The next start finds a sound store with all that was in it, and the operation succeeds."""
    store = Store.open(home)
    ImageStore(store.images).sweep()
    expected = OUTCOMES[operation]
    assert_sound(store, context)
    tags = {path.name for path in store.snapshots.iterdir()}
    before = {path.name for path in (prepared / "snapshots").iterdir()}
    assert before - tags <= expected.removes, context
    assert tags - before <= expected.adds, context
    if "base" not in tags and operation == "cascade":
        assert not tags, f"a parent went before its children; {context}"
    for tag in before & tags:
        was = contents(prepared / "snapshots" / tag)
        assert contents(store.snapshots / tag) == was, f"{tag} has changed; {context}"
    done = expected.removes.isdisjoint(tags) and expected.adds <= tags
    if not done or not (expected.removes or expected.adds):
        OPERATIONS[operation](store)
    assert_sound(store, f"tried again; {context}")


def assert_sound(store: Store, context: str) -> None:
    report = check_store(store, read_data=Slice(1, 1))
    assert report.sound, f"{report.findings}\n{context}"
