"""A few tests on real machines, as an ordinary user; `as_ordinary_user.py` runs any of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else"),
]

TESTS = Path(__file__).parents[1]
SLICE = (
    "test_branches.py::test_a_branch_of_a_fork_of_a_branch",
    "test_taken_over.py::test_branches_that_were_not_written_down",
    "test_volumes_in_guests.py::test_files_go_both_ways",
    "test_volumes_in_guests.py::test_a_named_volume_outlives_its_sandboxes",
)


def test_they_pass_with_subordinate_ids() -> None:
    program = [sys.executable, str(TESTS / "as_ordinary_user.py"), "65535", "--"]
    done = subprocess.run(
        [*program, "-q", *(str(TESTS / "vm" / name) for name in SLICE)],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SLICE)} passed" in done.stdout
