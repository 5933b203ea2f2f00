"""Hooks and host keys at a rebirth, in directories of this host."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from agent_on_host import is_alive, wait_for

from ratoon.machine.guest.agent import hooks
from ratoon.machine.guest.agent.spawn import ENVIRONMENT
from ratoon.machine.guest.agent.stream import Refusal


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Hooks ----------------------------------------------------------------------------------------


def test_hooks_are_the_executables_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("20-b", "10-a", "3-c"):
        script(tmp_path / name, "")
    (tmp_path / "README").write_text("not a program")
    (tmp_path / "directory").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to("10-a")
    found = [Path(hook).name for hook in hooks.find_hooks(str(tmp_path))]
    assert found == ["10-a", "20-b", "3-c", "linked"]
    assert hooks.find_hooks(str(tmp_path / "nowhere")) == []
    assert hooks.find_hooks(str(tmp_path / "README")) == []


def test_hooks_run_one_after_the_other_with_their_environment(tmp_path: Path) -> None:
    note = tmp_path / "note"
    say = f"echo $RATOON_INSTANCE_ID $HOME $(pwd) $(cat | wc -c) >>{note}; echo out; echo err >&2"
    slow = script(tmp_path / "1", f"sleep 0.2; {say}")
    hooks.run_hooks([slow, script(tmp_path / "2", say)], {"RATOON_INSTANCE_ID": "sb-1"})
    assert note.read_text() == "sb-1 /root / 0\n" * 2


@pytest.mark.parametrize(
    ("text", "seconds", "problem"),
    [
        ("echo reason >&2; exit 3", 60, "exited with 3: reason"),
        ("exit 1", 60, "exited with 1"),
        ("kill -TERM $$", 60, "was killed by signal 15"),
        (
            "yes lost | head -c 300000 >&2; echo 'the end' >&2; exit 1",
            60,
            r"exited with 1: [\s\S]*the end",
        ),
        ("echo stuck >&2; sleep 60", 2, "took longer than 2 s: stuck"),
        ("exec 2>&-; sleep 60", 0.2, "took longer than 0.2 s"),
        ("yes lost >&2", 2, r"took longer than 2 s: [\s\S]*lost"),
    ],
)
def test_a_hook_that_fails_is_named_and_is_the_last(
    tmp_path: Path, text: str, seconds: float, problem: str
) -> None:
    bad = script(tmp_path / "bad", text)
    never = script(tmp_path / "never", f"touch {tmp_path}/ran")
    before = names(Path("/proc/self/fd"))
    with pytest.raises(Refusal, match=f"^rebirth hook {bad} {problem}$") as refusal:
        hooks.run_hooks([bad, never], {}, seconds)
    assert refusal.value.kind == "hook-failed"
    assert len(str(refusal.value)) < 2000
    assert not (tmp_path / "ran").exists()
    assert names(Path("/proc/self/fd")) == before


def test_a_hook_that_is_no_program(tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_bytes(b"\x7fELF is not all there is to it")
    hook.chmod(0o755)
    with pytest.raises(Refusal, match=f"rebirth hook {hook}: Exec format error"):
        hooks.run_hooks([str(hook)], {})


def test_what_a_hook_leaves_running_is_not_waited_for(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    hooks.run_hooks([script(tmp_path / "1", f"sleep 60 & echo $! >{note}")], {})
    pid = int(note.read_text())
    assert is_alive(pid)
    os.kill(pid, 9)
    wait_for(lambda: not is_alive(pid))


def test_a_hook_whose_time_is_over_is_killed_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(Refusal):
        hooks.run_hooks([script(tmp_path / "1", f"sleep 60 & echo $! >{note}; wait")], {}, 2)
    wait_for(lambda: not is_alive(int(note.read_text())))


# Host keys ------------------------------------------------------------------------------------


def fingerprint(key: Path) -> str:
    listing = subprocess.run(["ssh-keygen", "-l", "-f", key], capture_output=True, check=True)
    return listing.stdout.decode()


def test_host_keys_are_made_anew_of_each_type_that_was_there(tmp_path: Path) -> None:
    for name in ("ssh_host_ed25519_key", "ssh_host_ecdsa_key"):
        kind = name.split("_")[2]
        command = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(command, check=True)
    (tmp_path / "sshd_config").write_text("kept")
    there = names(tmp_path)
    keys = hooks.find_host_keys(str(tmp_path))
    before = [fingerprint(Path(key)) for key in keys]
    assert len(keys) == 2
    hooks.renew_host_keys(keys, "sb-1")
    assert names(tmp_path) == there
    after = [fingerprint(Path(key)) for key in keys]
    assert not set(before) & set(after)
    for old, new, key in zip(before, after, keys, strict=True):
        assert old.split()[-1] == new.split()[-1]  # the type
        assert "root@sb-1" in new
        assert Path(key).stat().st_mode & 0o777 == 0o600
        private = subprocess.run(["ssh-keygen", "-y", "-f", key], capture_output=True, check=True)
        assert private.stdout.split()[:2] == Path(f"{key}.pub").read_bytes().split()[:2]


def test_without_ssh_keygen_they_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "PATH", "/no/such")
    for name in ("ssh_host_rsa_key", "ssh_host_rsa_key.pub", "ssh_host_dsa_key"):
        (tmp_path / name).write_text("old")
    hooks.renew_host_keys(hooks.find_host_keys(str(tmp_path)), "sb-1")
    assert names(tmp_path) == []


def test_a_key_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "ssh_host_odd_key").write_text("old")
    with pytest.raises(Refusal, match="ssh-keygen -t odd exited with 255: unknown key type odd"):
        hooks.renew_host_keys(hooks.find_host_keys(str(tmp_path)), "sb-1")
    assert names(tmp_path) == []


def test_there_need_be_none(tmp_path: Path) -> None:
    assert hooks.find_host_keys(str(tmp_path / "nowhere")) == []
