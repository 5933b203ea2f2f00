"""`ratoon bench`: measure on this machine what the documentation tells of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ratoon.cli.app import Json, app, complain, print_json, run, say
from ratoon.cli.screen import answers
from ratoon.errors import RatoonError

Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Which ones; without, their list.")
]
Iterations = Annotated[
    int | None, typer.Option(min=1, help="Rounds; by default as many as the bench thinks right.")
]
OutDir = Annotated[Path, typer.Option(help="Where the CSV and JSON files go.")]
BaseTag = Annotated[
    str | None,
    typer.Option(help="A snapshot of this store to build on; what is built stays there."),
]
SkipBuild = Annotated[
    bool, typer.Option("--skip-build", help="Take what a run with --base-tag has left.")
]


@app.command("bench")
def bench(
    names: Names = None,
    iterations: Iterations = None,
    out_dir: OutDir = Path("build/bench"),
    base_tag: BaseTag = None,
    skip_build: SkipBuild = False,
    as_json: Json = False,
) -> None:
    """Measure Ratoon on this machine, beside what one would use instead.

    Each bench works in a store of its own, which is removed at the end; `all` is all of them. A
    target that is missed is shown and no failure; exit code 1 if results are wrong.
    """
    from ratoon.bench import bench as benches
    from ratoon.bench.tables import show

    if not names:
        for name, what in benches.NAMES.items():
            print(f"{name:<10}{what}")
        return
    chosen = [benches.load(name) for name in (benches.NAMES if names == ["all"] else names)]
    settings = benches.Settings(out_dir, iterations, base_tag, skip_build)
    documents = []
    wrong = False
    for number, each in enumerate(chosen):
        if number:
            benches.wait_for_calm(say)
        say(f"{each.name}: {benches.NAMES[each.name]}")
        try:
            outcome = run(benches.run(each, settings, say))
        except RatoonError as error:
            if len(chosen) == 1:
                raise
            complain(f"{each.name}: {error}")  # the others are measured all the same
            wrong = True
            continue
        if not as_json:
            show(
                answers if answers.is_terminal else Console(width=200),
                each.tables(outcome.samples),
                each.targets(outcome.samples),
            )
        documents.append(outcome.document)
        if problem := each.wrong(outcome.samples):
            complain(f"{each.name}: {problem}")
            wrong = True
        say(f"{each.name}: every sample is in {out_dir}")
    if as_json:
        print_json(documents)
    raise typer.Exit(int(wrong))
