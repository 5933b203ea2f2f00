"""A sandbox whose owner was killed leaves control groups; the next start takes them away."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.sweep import sweep
from ratoon.machine.host.cgroups import Cgroups
from ratoon.machine.host.hierarchies import hierarchies
from ratoon.machine.host.limits import Limits
from ratoon.store.snapshot.store import Store


def test_groups_of_the_dead_are_swept_with_what_is_left_in_them(tmp_path: Path) -> None:
    store, runtime = Store.open(tmp_path / "home"), tmp_path / "run"
    directory = SandboxDirectory.create(store.sandboxes, store.lock, runtime)
    cgroup = Cgroups(tmp_path.name, hierarchies()).create(directory.path, Limits(pids=200))
    assert cgroup is not None
    (group,) = cgroup.groups
    with subprocess.Popen(["sleep", "1000"]) as machine:
        cgroup.add(machine.pid)
        sweep(store, runtime)
        assert group.directory.exists(), "somebody holds it"
        directory.let_go()
        sweep(store, runtime)
        assert machine.wait() == -9
    assert not directory.path.exists()
    assert not group.directory.exists()
    assert not group.directory.parent.exists()
