"""`ratoon jail`: what QEMU and the programs that read disks are confined by on this host."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import asdict
from typing import Annotated, NoReturn

import typer

from ratoon.cli.app import Json, app, enter_user_namespace, print_json, run
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
    enter_user_namespace()
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


def try_jail(as_json: bool) -> NoReturn:
    """Have a stand-in for QEMU try what it can, and tell of that; ends with an exit code."""
    # Such as the driver of QEMU, which no other verb here needs.
    from ratoon.machine.vmm.attack import OWN, attack

    found = run(attack())
    groups = Counter((each.group, each.got) for each in found)
    table = [
        {"group": group, "denied": groups[group, "denied"], "allowed": groups[group, "allowed"]}
        for group in dict.fromkeys(each.group for each in found)
    ]
    surprises = [each for each in found if each.is_surprise]
    if as_json:
        print_json({"groups": table, "surprises": [asdict(each) for each in surprises]})
    else:
        for row in table:
            counts = f"{row['denied']:>4} denied {row['allowed']:>4} allowed"
            answers.print(f"{row['group']:<12} {counts}{'  (its own)' * (row['group'] == OWN)}")
        for each in surprises:
            answers.print(_indented("NOT EXPECTED: ", f"{each.group}: {each.name}: {each.how}"))
        if not surprises:
            answers.print("\nNothing that docs/security.md does not list.")
    raise typer.Exit(1 if surprises else 0)


def _indented(first: str, text: str) -> str:
    width = max(answers.width, 30)
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent="   ")
