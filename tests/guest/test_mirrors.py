"""Where packages are fetched from, and what becomes of what comes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from debian_mirror import Mirror, mirror
from ratoon.errors import HostError, InvalidInput
from ratoon.machine.guest import mirrors

PATH, CONTENT = "pool/main/p/p_1_amd64.deb", b"a package " * 1000


@pytest.fixture
def there() -> Iterator[Mirror]:
    with mirror() as found:
        found.files[PATH] = CONTENT
        yield found


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "PAUSE", 0)


def fetch(*addresses: str, said: list[str] | None = None, content: bytes = CONTENT) -> bytes:
    return mirrors.fetch(
        PATH,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        addresses=addresses,
        progress=(said if said is not None else []).append,
    )


# Fetching ---------------------------------------------------------------------------------------


def test_a_file_that_is_there(there: Mirror) -> None:
    said: list[str] = []
    assert fetch(there.address, said=said) == CONTENT
    assert (there.asked, said) == ([PATH], [])


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        ("cut off", "it broke off after 5000 of 10000 bytes"),
        ("altered", "it has not the SHA-256 "),
        ("busy", "HTTP 503"),
    ],
)
def test_what_fails_is_tried_again(there: Mirror, failure: str, told: str) -> None:
    said: list[str] = []
    there.failures[PATH] = [failure] * (mirrors.TRIES - 1)  # type: ignore[list-item]
    assert fetch(there.address, said=said) == CONTENT
    assert len(there.asked) == mirrors.TRIES
    assert all(told in line and line.endswith("trying again") for line in said)


@pytest.mark.parametrize("failure", ["cut off", "altered", "busy"])
def test_not_for_ever(there: Mirror, failure: str) -> None:
    there.failures[PATH] = [failure] * mirrors.TRIES  # type: ignore[list-item]
    with pytest.raises(HostError, match=r"^p_1_amd64.deb could not be fetched; http://127"):
        fetch(there.address)
    assert len(there.asked) == mirrors.TRIES


def test_what_is_not_there_is_asked_for_once(there: Mirror) -> None:
    there.failures[PATH] = ["missing"]
    with pytest.raises(HostError, match="HTTP 404"):
        fetch(there.address)
    assert there.asked == [PATH]


def test_the_next_mirror_has_it(there: Mirror) -> None:
    """Whatever is wrong with those before it; nobody listens at the first one."""
    with mirror() as empty, mirror() as wrong:
        wrong.files[PATH] = CONTENT[::-1]
        closed = "http://127.0.0.1:1/debian"
        said: list[str] = []
        addresses = (closed, empty.address, wrong.address, there.address)
        assert fetch(*addresses, said=said) == CONTENT
        assert [len(each.asked) for each in (empty, wrong, there)] == [1, mirrors.TRIES, 1]
    gone_on = [line.partition(": ")[0] for line in said if line.endswith("going on without it")]
    assert gone_on == [*addresses[:3]]


def test_no_more_is_taken_than_it_should_have(there: Mirror) -> None:
    with pytest.raises(HostError, match="SHA-256"):
        fetch(there.address, content=CONTENT[:-1])


# Which are asked ----------------------------------------------------------------------------------


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    monkeypatch.delenv("RATOON_MIRROR", raising=False)
    return tmp_path


def test_sources_of_one_line(apt: Path) -> None:
    (apt / "sources.list").write_text(
        "# deb http://commented.example/debian bookworm main\n"
        "deb http://one.example/debian/ bookworm main contrib  # why\n"
        "deb-src http://source.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/some/key.gpg] https://two.example/d trixie main\n"
        "deb http://one.example/debian bookworm-updates main\n"
        "deb http://three.example/debian-security bookworm-security main\n"
        "deb http://four.example/security stable/updates main\n"
        "deb cdrom:[Debian]/ bookworm main\n"
        "deb file:/srv/debian bookworm main\n"
    )
    (apt / "sources.list.d/other.list").write_text(
        "deb http://archive.ubuntu.example/ubuntu noble main\ndeb\n"
        "deb http://five.example/debian sid main\n"
    )
    (apt / "sources.list.d/off.list.disabled").write_text("deb http://off.example/d sid main\n")
    assert mirrors.host_mirrors("debian", apt) == [
        *("http://one.example/debian", "https://two.example/d", "http://five.example/debian"),
    ]
    assert mirrors.host_mirrors("debian-security", apt) == [
        *("http://three.example/debian-security", "http://four.example/security"),
    ]


def test_sources_of_stanzas(apt: Path) -> None:
    (apt / "sources.list.d/debian.sources").write_text(
        "Types: deb deb-src\n"
        "# URIs: http://commented.example/debian\n"
        "URIs: http://one.example/debian\n"
        "  http://two.example/debian\n"
        "Suites: bookworm\n bookworm-updates\n"
        "Components: main\n"
        "Signed-By:\n"
        " -----BEGIN PGP PUBLIC KEY BLOCK-----\n"
        " .\n"
        " URIs: http://key.example/debian\n"
        "\n"
        "types: deb\n"
        "uris: http://three.example/debian-security\n"
        "suites: bookworm-security\n"
        "\n"
        "Types: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: bookworm\n\n"
        "Types: deb-src\nURIs: http://source.example/debian\nSuites: bookworm\n\n"
        "Types: deb\nSuites: bookworm\n\n"
        "Types: deb\nURIs: http://flat.example/debian\nSuites: ./\n"
    )
    assert mirrors.host_mirrors("debian", apt) == [
        *("http://one.example/debian", "http://two.example/debian")
    ]
    assert mirrors.host_mirrors("debian-security", apt) == ["http://three.example/debian-security"]


def test_a_host_without_apt(tmp_path: Path) -> None:
    assert mirrors.host_mirrors("debian", tmp_path / "none") == []


def test_the_order(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "host_mirrors", lambda archive: [f"http://host.example/{archive}"])
    last = [f"{mirrors.DEBIAN}/debian", f"{mirrors.SNAPSHOT}/debian/20260101T000000Z"]
    assert mirrors.mirrors("debian", "20260101T000000Z") == ["http://host.example/debian", *last]
    monkeypatch.setenv("RATOON_MIRROR", "http://own.example/debian/")
    assert mirrors.mirrors("debian", "20260101T000000Z") == [
        *("http://own.example/debian", "http://host.example/debian", *last)
    ]
    first = mirrors.mirrors("debian-security", "20260101T000000Z")[0]
    assert first == "http://own.example/debian-security"
    monkeypatch.setenv("RATOON_MIRROR", f"{mirrors.DEBIAN}/debian")
    asked = mirrors.mirrors("debian", "20260101T000000Z")
    assert asked == [last[0], "http://host.example/debian", last[1]], "each once"


@pytest.mark.parametrize("address", ["mirror", "ftp://one.example/debian", "http://one.example"])
def test_what_is_no_mirror(apt: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RATOON_MIRROR", address)
    with pytest.raises(InvalidInput, match="RATOON_MIRROR is '"):
        mirrors.mirrors("debian", "")
