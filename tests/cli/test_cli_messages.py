"""Errors, as the command line words them."""

from __future__ import annotations

from ratoon.cli.app import explain
from ratoon.errors import NotHealthy


def test_the_status_of_an_error_is_no_part_of_what_a_program_wrote() -> None:
    error = NotHealthy("it ended\n--- what it wrote last ---\nbad\noops")
    assert explain(error) == str(error)
    error.answered = 409
    assert explain(error) == "it ended (HTTP 409)\n--- what it wrote last ---\nbad\noops"
