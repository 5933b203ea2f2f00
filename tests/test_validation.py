"""Errors of pydantic's, as people read them."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from ratoon.validation import first_error


class Even(BaseModel):
    numbers: list[int]

    @model_validator(mode="after")
    def _is_even(self) -> Even:
        if len(self.numbers) % 2:
            raise ValueError("there has to be an even number of them")
        return self


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([1, "x"], "numbers.1: Input should be a valid integer"),
        ([1], "there has to be an even number of them"),
        (["x"] * 101, "101 errors"),
    ],
)
def test_an_error_says_where_and_how(numbers: list[object], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Even.model_validate({"numbers": numbers})
    assert first_error(caught.value).startswith(said)
