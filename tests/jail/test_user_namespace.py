"""What an ordinary user is told of namespaces and ids; the rest is in `tests/users`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ratoon.jail import user_namespace
from ratoon.jail.user_namespace import way_out, way_to_lend


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(user_namespace, "_ETC", tmp_path)
    monkeypatch.setattr(user_namespace, "_names", lambda uid: ["me", "1000"])
    return tmp_path


def test_ids_are_lent_that_nobody_has(etc: Path) -> None:
    assert way_to_lend(1000) == (
        "usermod --add-subuids=100000-165535 --add-subgids=100000-165535 me"
    )
    (etc / "subuid").write_text("other:100000:65536\nnonsense\nanother:165536:1000000\n")
    (etc / "subgid").write_text("other:100000:65536\n1000:300000:65536\n")
    assert way_to_lend(1000) == "usermod --add-subuids=1165536-1231071 me"
    (etc / "subuid").write_text("me:165536:10\n")
    assert way_to_lend(1000) is None


def test_what_bars_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    assert way_out(tmp_path).endswith("or be root")
    say("kernel/apparmor_restrict_unprivileged_userns", "1\n")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "ratoon"), "doctor"])
    command = way_out(tmp_path).removeprefix("as root: ")
    profile = command.partition(" >/etc/apparmor.d/ratoon && apparmor_parser -r ")[0]
    assert subprocess.check_output(profile, shell=True, text=True) == (
        "abi <abi/4.0>,\ninclude <tunables/global>\n"
        f'profile ratoon "{tmp_path}/bin/ratoon" flags=(unconfined) {{\n  userns,\n}}\n'
    )
    say("user/max_user_namespaces", "0\n")
    assert way_out(tmp_path) == (
        "as root: echo 'user.max_user_namespaces = 15000' >/etc/sysctl.d/60-ratoon.conf && "
        "sysctl --system"
    )
    say("kernel/unprivileged_userns_clone", "0\n")
    assert "kernel.unprivileged_userns_clone = 1" in way_out(tmp_path)


def test_the_profile_is_for_the_script_that_users_start(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(sys.executable).with_name("ratoon").resolve()
    monkeypatch.setattr(sys, "argv", ["/somewhere/ratoon/__main__.py"])
    assert user_namespace._own_program() == script
