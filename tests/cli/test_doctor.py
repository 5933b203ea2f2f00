"""`ratoon doctor` as its users meet it: one screen, what to do, and an exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from ratoon.cli.guest_checks import accelerator_at_a_glance, check_accelerator
from ratoon.cli.jail import try_jail
from ratoon.cli.system import drawn
from ratoon.engine.sandbox.accelerator import Probe
from ratoon.machine.host.checks import Check
from ratoon.machine.host.programs import PACKAGES
from ratoon.machine.vmm import attack, kvm
from ratoon.machine.vmm.attack import Attempted

LINES = 24
APT = "apt-get update && apt-get install -y --no-install-recommends"


def doctor(
    home: Path, *arguments: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    return ratoon(home, "doctor", *arguments, path=path)


def ratoon(
    home: Path, *arguments: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("ratoon")
    environment = {**os.environ, "RATOON_HOME": str(home), "COLUMNS": "80"}
    environment["PATH"] = path or environment["PATH"]
    return subprocess.run(
        [program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_quick_look_fits_on_a_screen(tmp_path: Path) -> None:
    done = doctor(tmp_path / "home", "--quick")
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= 80
    names = [line[5:18].strip() for line in lines if line[:5].strip()]
    assert names == [
        *("user", "programs", "QEMU", "home", "cache", "memory", "swap", "file limits"),
        *("dirty pages", "limits", "network", "images", "jail", "accelerator"),
    ]
    assert not (tmp_path / "home").exists()
    assert done.stderr == ""


def test_as_json(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--quick", "--json")
    found = [Check(**check) for check in json.loads(done.stdout)]
    assert {check.state for check in found} <= {"ok", "warn"}
    assert done.returncode == 0


@pytest.fixture
def programs(tmp_path: Path) -> str:
    """A PATH with all programs but one."""
    directory = tmp_path / "programs"
    directory.mkdir()
    for name in {*PACKAGES, "ip", "nft"} - {"setpriv"}:
        if ".so." in name:
            continue
        found = shutil.which(name)
        assert found
        (directory / name).symlink_to(found)
    return str(directory)


def test_without_a_program_no_guest_is_tried(tmp_path: Path, programs: str) -> None:
    done = doctor(tmp_path, path=programs)
    assert done.returncode == 1
    assert "bad  programs     missing: setpriv" in done.stdout
    assert f"→ as root: {APT} util-linux" in " ".join(done.stdout.split())
    assert "accelerator" not in done.stdout
    assert done.stderr == "no guest is tried: see what is bad\n"


# Lines ----------------------------------------------------------------------------------------


def test_a_line_is_wrapped_below_its_beginning() -> None:
    check = Check(
        "network", "warn", "long " * 30, "do this and then that, and so on, and so forth, " * 2
    )
    lines = drawn(check, 80).plain.splitlines()
    assert lines[0].startswith("warn network      long long")
    assert all(line[:18].isspace() for line in lines[1:])
    assert max(map(len, lines)) <= 80
    (first,) = (line for line in lines if "→" in line)
    assert first[18:].startswith("→ do this")
    assert lines[lines.index(first) + 1][18:20] == "  "


@pytest.mark.parametrize("state", ["ok", "warn", "bad"])
def test_names_are_in_one_column(state: str) -> None:
    check = Check("x", state, "found")  # type: ignore[arg-type]
    assert drawn(check, 80).plain == f"{state:<5}{'x':<13}found"


# The accelerator ------------------------------------------------------------------------------


def test_kvm() -> None:
    probe = Probe(accelerator="kvm", cpu="host", reason="it booted the guest's kernel")
    check = check_accelerator(probe)
    assert check.state == "ok"
    assert check.found.startswith("KVM, TSC ")
    assert check.found.endswith("MHz: it booted the guest's kernel")


def emulated(details: str = "") -> Probe:
    return Probe(accelerator="tcg", cpu="max", reason="KVM did not boot it", details=details)


def test_emulation_is_a_warning_that_says_what_it_means_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "kvm")
    check = check_accelerator(emulated("qemu: KVM internal error\nCode=" + "?? " * 400))
    assert check.state == "warn"
    assert check.found.startswith("TCG, TSC ")
    assert check.found.endswith("guests are emulated, which is slow, as KVM did not boot it")
    assert "take bare metal" in check.todo
    assert "no security boundary" in check.todo
    lines = drawn(check, 80).plain.splitlines()
    (raw,) = (number for number, line in enumerate(lines) if "KVM internal error" in line)
    (todo,) = (number for number, line in enumerate(lines) if "→" in line)
    assert todo < raw, "the words of programs come last"
    assert len(lines) < LINES
    assert max(map(len, lines)) <= 80


def test_the_way_to_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "kvm"
    monkeypatch.setattr(kvm, "DEVICE", device)
    assert "in the firmware" in check_accelerator(emulated()).todo
    device.touch()
    monkeypatch.setattr(kvm, "opens", lambda: False)
    assert f"the group that may open {device}" in check_accelerator(emulated()).todo


def test_at_a_glance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "kvm"
    monkeypatch.setattr(kvm, "DEVICE", device)
    assert f"{device} cannot be opened" in accelerator_at_a_glance().found
    device.touch()
    assert accelerator_at_a_glance().found == f"{device} opens; --quick does not try a guest on it"


def test_the_jail_is_tried(tmp_path: Path) -> None:
    done = doctor(tmp_path / "home", "--attack")
    assert done.returncode == 0, done
    groups = [line.split()[0] for line in done.stdout.splitlines() if " denied " in line]
    assert groups == [
        *("files", "processes", "namespaces", "credentials", "sockets", "kernel", "exhaustion"),
        "own",
    ]
    assert done.stdout.endswith("Nothing that docs/security.md does not list.\n")
    assert not (tmp_path / "home").exists()


def test_what_the_jail_lets_through_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def found() -> list[Attempted]:
        got = Attempted("files", "open host paths for reading", "allowed", "/etc/shadow: 64 bytes")
        return [got, Attempted("files", "list host directories", "allowed", "/etc")]

    monkeypatch.setattr(attack, "attack", found)
    with pytest.raises(typer.Exit) as ended:
        try_jail(as_json=True)
    assert ended.value.exit_code == 1
    told = json.loads(capsys.readouterr().out)
    assert told["groups"] == [{"group": "files", "denied": 0, "allowed": 2}]
    assert [each["how"] for each in told["surprises"]] == ["/etc/shadow: 64 bytes"]
    with pytest.raises(typer.Exit):
        try_jail(as_json=False)
    line = "NOT EXPECTED: files: open host paths for reading: /etc/shadow: 64 bytes"
    assert line in " ".join(capsys.readouterr().out.split())
