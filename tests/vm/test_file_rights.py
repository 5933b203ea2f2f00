"""Users of a guest have the rights on a volume that they have on the guest's own ext4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import file_rights
from vm_helpers import FOR_EVER

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions, Volume

VOLUMES = Path(__file__).parents[2] / "docs/volumes.md"
ALL = "root owner member nobody"
USERS = "owner member nobody"

#: In what a volume differs from ext4: for a reason, which docs/volumes.md gives in these words, in
#: a case for some users, and how (`difference`).
DIFFERENCES: dict[str, list[tuple[str, str, str]]] = {
    "No file gets a set-user-id or set-group-id bit, and no directory a set-user-id bit": [
        ("create: set-user-id", ALL, "d/f mode: -rwxr-xr-x, not -rwsr-xr-x"),
        ("create: set-group-id", ALL, "d/f mode: -rwxr-xr-x, not -rwxr-sr-x"),
        (
            "create: a set-group-id file in a setgid directory",
            "root owner member",
            "d/f mode: -rwxrwxr-x, not -rwxrwsr-x",
        ),
        ("chmod: set-user-id", "root owner", "f mode: -rwxr-xr-x, not -rwsr-xr-x"),
        ("chmod: set-group-id", "root owner", "f mode: -rwxr-xr-x, not -rwxr-sr-x"),
        ("chmod: set-group-id of an alien group", "root", "f mode: -rwxr-xr-x, not -rwxr-sr-x"),
        ("chmod: a setuid directory", "root owner", "d mode: drwxr-xr-x, not drwsr-xr-x"),
        ("chown: a set-user-id program", "member nobody", "f mode: -rwxr-xr-x, not -rwsr-xr-x"),
        ("chown: a set-group-id program", "member nobody", "f mode: -rwxr-xr-x, not -rwxr-sr-x"),
        ("truncate: a set-user-id program", "root", "f mode: -rwxrwxrwx, not -rwsrwxrwx"),
        ("write: a set-user-id program", "root", "f mode: -rwxrwxrwx, not -rwsrwxrwx"),
        ("write: a set-group-id program", "root", "f mode: -rwxrwxrwx, not -rwxrwsrwx"),
    ],
    "Pipes, sockets and device nodes cannot be made (`EPERM`)": [
        ("create: a pipe", ALL, "mkfifo d/p: EPERM, not done"),
        ("create: a pipe in root's", "root", "mkfifo d/p: EPERM, not done"),
        ("create: a pipe in root's", USERS, "mkfifo d/p: EPERM, not EACCES"),
        ("create: a socket", ALL, "socket d/s: EPERM, not done"),
        ("create: a device", "root", "mknod d/n: EPERM, not done"),
    ],
    "Rights that are taken away from others than the owner end for open files, too (`EACCES`)": [
        ("open: the owner writes on when he may not", "member nobody", "close: EACCES, not done"),
        ("open: the owner reads on when he may not", "member nobody", "get: EACCES, not abc"),
        ("open: others write on when they may not", USERS, "sync: EACCES, not done"),
        ("open: others read on when they may not", USERS, "get: EACCES, not abc"),
    ],
    "A file that is removed while it is open in the guest stays as `.nfs…` until it is closed": [
        ("open: removed", ALL, "links: 1, not 0; list d: .nfs, not "),
        ("open: removed, with its directory", ALL, "rmdir d/e: ENOTEMPTY, not done"),
        ("open: replaced", ALL, "list d: .nfs f, not f"),
    ],
    "Of a user's groups the first 16 count": [
        ("groups: the last of many", "many", "read f: EACCES, not abc"),
        ("groups: a directory of the last of many", "many", "create d/f 644: EACCES, not done"),
    ],
    "Who may write to a file may set one of its times to now": [
        ("utime: one of both now, of the group's", "member", "utime f one: done, not EPERM"),
    ],
    "What changes nothing of a file leaves its times": [
        ("chown: to nothing else", ALL, "f changed: False, not True"),
        (
            "truncate: to what it is",
            "root owner member",
            "f changed: False, not True; f content: None, not abc; f modified: old, not new",
        ),
    ],
    "Who may not write to a sticky directory has `EPERM` for `EACCES`": [
        ("remove: of the group's sticky directory", "nobody", "unlink d/f: EPERM, not EACCES"),
    ],
    "There are no extended attributes, no `fallocate`, no `O_TMPFILE` and no `RENAME_EXCHANGE`": [
        ("more: an attribute of the user's", ALL, "setxattr f: ENOTSUP, not done"),
        ("more: space ahead", ALL, "fallocate f: ENOTSUP, not done"),
        ("more: two names exchanged", ALL, "exchange d/f d/g: EINVAL, not done"),
        ("more: a file without a name", ALL, "tmpfile d: ENOTSUP, not done"),
    ],
}


async def test_rights_are_those_of_a_local_file_system(engine: Engine, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    options = SandboxOptions(volumes=(Volume(source=str(tmp_path), target="/mnt/shared"),))
    script = Path(file_rights.__file__).read_bytes()
    async with await engine.fork_one("base", options) as sandbox:

        async def guest(*arguments: str) -> bytes:
            command = ["python3", "-", *arguments]
            result = await sandbox.exec(command, stdin=script, timeout=10 * FOR_EVER)
            assert result.exit_code == 0, result
            return result.stdout

        program = tmp_path / "program"  # the guest's: the host may be of another Debian
        program.write_bytes(await sandbox.files.read("/bin/true"))
        file_rights.make(str(tmp_path / "cases"), str(program))
        volume = json.loads(await guest("run", "/mnt/shared/cases"))
        await guest("make", "/var/tmp/cases")
        local = json.loads(await guest("run", "/var/tmp/cases"))
    found = {
        (case, user, difference(case, volume[case][user], local[case][user]))
        for case, users in local.items()
        for user in users
        if volume[case][user] != local[case][user]
    }
    listed = {
        (case, user, how)
        for cases in DIFFERENCES.values()
        for case, users, how in cases
        for user in users.split()
    }
    assert sorted(found - listed) == []
    assert sorted(listed - found) == [], "these differences are no more"


def difference(case: str, volume: list[Any], local: list[Any]) -> str:
    """How a volume's outcome differs: in what acts return, or else in what has become of files."""
    acts = ACTS[case]
    found = [
        f"{act}: {_told(here)}, not {_told(there)}"
        for act, here, there in zip(acts, volume[0], local[0], strict=True)
        if here != there
    ]
    for name in sorted(volume[1].keys() | local[1].keys()) if not found else []:
        here, there = volume[1].get(name, {}), local[1].get(name, {})
        found += [
            f"{name.removeprefix('./')} {what}: {here.get(what)}, not {there.get(what)}"
            for what in sorted(here.keys() | there.keys())
            if here.get(what) != there.get(what)
        ]
    return "; ".join(found)


def _told(outcome: object) -> object:
    return "done" if outcome is None else outcome


ACTS = {name: acts for subject in file_rights.CASES for name, _, acts in file_rights.cases(subject)}


def test_the_differences_are_told() -> None:
    text = " ".join(VOLUMES.read_text().split())
    assert [reason for reason in DIFFERENCES if reason not in text] == []
