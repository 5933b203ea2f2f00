"""`ratoon jail`: what QEMU and the programs that read disks are confined by on this host."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from ratoon.cli.app import Json, app, print_json
from ratoon.cli.screen import answers
from ratoon.jail.steps import STEPS

Describe = Annotated[
    bool, typer.Option("--describe", help="List the steps that are taken, in their order.")
]


@app.command("jail", no_args_is_help=True)
def jail(describe: Describe = False, as_json: Json = False) -> None:
    """Show what QEMU and the programs that read disks are confined by.

    Each step, and what somebody who has broken into such a program does not get because of it.
    Which hold for a sandbox that runs is in the answer about it (`layers`).
    """
    steps = [
        {"step": step.name, "holds_back": step.holds_back, "missing": step.missing()}
        for step in STEPS
    ]
    if as_json:
        print_json(steps)
    elif describe:
        for number, step in enumerate(STEPS, 1):
            answers.print(_indented(f"{number}. ", step.name))
            answers.print(_indented("   ", f"holds back: {step.holds_back}"))
            if missing := step.missing():
                answers.print(_indented("   ", f"NOT TAKEN: {missing}"))


def _indented(first: str, text: str) -> str:
    width = max(answers.width, 30)
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent="   ")
