"""Users and groups, from the sandbox's own text files, whatever is in them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ratoon.machine.guest.agent import users
from ratoon.machine.guest.agent.stream import Refusal
from ratoon.machine.guest.agent.users import look_up

PASSWD = b"""\
root:x:0:0:root:/root:/bin/bash
# a comment
too:few:1:2
ann:x:1000:1000:Ann,,,:/home/ann:/bin/zsh
bob:x:1001:100::/home/b\xff:
bad:x:-1:1::/:
huge:x:4294967295:1::/:
toor:x:0:0::/elsewhere:/bin/sh
"""
GROUP = b"""\
root:x:0:
users:x:100:ann
ann:x:1000:
sudo:x:27:bob,ann
bad:x:none:ann
docker:x:999:annette,ann
"""


@pytest.fixture
def databases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes, bytes], None]:
    passwd, group = tmp_path / "passwd", tmp_path / "group"
    monkeypatch.setattr(users, "PASSWD", str(passwd))
    monkeypatch.setattr(users, "GROUP", str(group))

    def write(in_passwd: bytes, in_group: bytes) -> None:
        passwd.write_bytes(in_passwd)
        group.write_bytes(in_group)

    write(PASSWD, GROUP)
    return write


@pytest.mark.usefixtures("databases")
@pytest.mark.parametrize(
    ("text", "uid", "gid", "groups", "name", "home", "shell"),
    [
        ("ann", 1000, 1000, [100, 27, 999], "ann", "/home/ann", "/bin/zsh"),
        ("1000", 1000, 1000, [100, 27, 999], "ann", "/home/ann", "/bin/zsh"),
        ("root", 0, 0, [], "root", "/root", "/bin/bash"),
        ("0", 0, 0, [], "root", "/root", "/bin/bash"),
        ("toor", 0, 0, [], "toor", "/elsewhere", "/bin/sh"),
        ("bob", 1001, 100, [27], "bob", "/home/b\udcff", "/bin/sh"),
        ("ann:users", 1000, 100, [], "ann", "/home/ann", "/bin/zsh"),
        ("ann:27", 1000, 27, [], "ann", "/home/ann", "/bin/zsh"),
        ("ann:55555", 1000, 55555, [], "ann", "/home/ann", "/bin/zsh"),
        ("4242", 4242, 0, [], "4242", "/", "/bin/sh"),
        ("4242:sudo", 4242, 27, [], "4242", "/", "/bin/sh"),
        ("4294967294:0", 4294967294, 0, [], "4294967294", "/", "/bin/sh"),
    ],
)
def test_who_is_meant(
    text: str, uid: int, gid: int, groups: list[int], name: str, home: str, shell: str
) -> None:
    user = look_up(text)
    assert (user.uid, user.gid, user.groups) == (uid, gid, groups)
    assert user.environment == {"HOME": home, "USER": name, "LOGNAME": name, "SHELL": shell}


@pytest.mark.usefixtures("databases")
@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "nobody", "too", "bad", "huge", "-1", "4294967295", "99999999999", "²", "Ann"),
        *("ann\n", "ann:", ":27", "ann:nogroup", "ann:bad", "ann:-1", "ann:4294967295", "ann:27:1"),
    ],
)
def test_who_is_not_there(text: str) -> None:
    with pytest.raises(Refusal, match=r"the sandbox has no (user|group)") as refused:
        look_up(text)
    assert refused.value.kind == "no-user"


@pytest.mark.usefixtures("databases")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: None])
def test_without_a_file_there_are_numbers_alone(make: Callable[[str], None]) -> None:
    for path in (users.PASSWD, users.GROUP):
        Path(path).unlink()
        make(path)
    assert (look_up("7:8").uid, look_up("7:8").gid) == (7, 8)
    with pytest.raises(Refusal):
        look_up("root")


def test_no_more_is_read_than_a_limit(databases: Callable[[bytes, bytes], None]) -> None:
    databases(b"#" * users.LIMIT + b"\n" + PASSWD, GROUP)
    with pytest.raises(Refusal):
        look_up("ann")


lines = st.lists(
    st.lists(st.sampled_from([b"a", b"b", b"0", b"1", b"\xff", b"", b"-1", b"a,b"]), max_size=8)
).map(lambda rows: b"\n".join(b":".join(row) for row in rows))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines, lines, st.sampled_from(["a", "1", "a:b", "1:1", "", ":"]))
@example(b"a:x:\xc2\xb2:1:::", b"", "a")
def test_whatever_is_in_the_files(
    databases: Callable[[bytes, bytes], None], passwd: bytes, group: bytes, text: str
) -> None:
    databases(passwd, group)
    try:
        user = look_up(text)
    except Refusal:
        return
    assert all(0 <= number < 2**32 - 1 for number in (user.uid, user.gid, *user.groups))
