"""Documents are whole, sound, and of known fields alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from ratoon.documents import Document


class Part(Document, strict=False):
    number: int


class Whole(Document):
    name: str
    seconds: float = 1
    part: Part = Part(number=1)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    Whole(name="Grüße").save(path)
    Whole(name="Grüße", seconds=2.5).save(path)
    assert Whole.load(path) == Whole.load_or_none(path) == Whole(name="Grüße", seconds=2.5)
    assert path.read_bytes().endswith(b"}\n")
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"name": 1}',
        '{"name": "x", "more": 1}',
        '{"name": "x", "seconds": "1"}',
        '{"name": "x", "seconds": NaN}',
        '{"name": "x", "part": {"number": 1, "more": 1}}',
    ],
)
def test_what_makes_no_sense_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "whole.json"
    path.write_text(content)
    with pytest.raises(ValidationError):
        Whole.load(path)
    assert Whole.load_or_none(path) is None


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Whole.load(tmp_path / "absent")
    assert Whole.load_or_none(tmp_path / "absent") is None


def test_a_part_that_users_fill_in_is_taken_as_they_write_it(tmp_path: Path) -> None:
    (tmp_path / "whole.json").write_text('{"name": "x", "part": {"number": "7"}}')
    assert Whole.load(tmp_path / "whole.json").part.number == 7
