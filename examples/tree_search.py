"""Tree search over forks: a game that cannot be saved, played to its best end.

    python examples/tree_search.py [SNAPSHOT]

docs/tutorial.md explains it piece by piece.
"""

from __future__ import annotations

import ast
import sys
from contextlib import ExitStack
from typing import Any

from ratoon import RatoonError, Sandbox

GAME = """
ROOMS = {
    "cellar": {"ladder": "hall", "hole": "pit"},
    "pit": {},
    "hall": {"door": "library", "window": "garden", "stairs": "attic"},
    "library": {"shelf": "study", "chute": "pit"},
    "garden": {"gate": "road", "well": "cave"},
    "attic": {"trunk": "nothing"},
    "study": {"safe": "vault"},
    "cave": {"crack": "pit"},
    "road": {},
    "nothing": {},
    "vault": {},
}
GOLD = {"library": 2, "garden": 3, "study": 4, "cave": 1, "vault": 90}

class Game:
    room, gold, path = "cellar", 0, ()

    def exits(self):
        return sorted(ROOMS[self.room])

    def go(self, exit):  # and there is no way back
        self.room = ROOMS[self.room][exit]
        self.gold += GOLD.get(self.room, 0)
        self.path = (*self.path, exit)

game = Game()
"""


def ask(sandbox: Sandbox, question: str) -> Any:
    """The value of a Python expression in the sandbox."""
    answer = sandbox.eval(question)
    if answer.error:
        raise RuntimeError(answer.error)
    return ast.literal_eval(answer.result or "None")


def grow(sandbox: Sandbox, alive: ExitStack) -> list[Sandbox]:
    """One fork of a sandbox for each thing that can be done in it, and it done there."""
    exits = ask(sandbox, "game.exits()")
    if not exits:
        return []
    grown = []
    for exit, fork in zip(exits, sandbox.fork(len(exits)), strict=True):
        if isinstance(fork, RatoonError):
            raise fork
        alive.enter_context(fork)
        ask(fork, f"game.go({exit!r})")
        grown.append(fork)
    return grown


def search(root: Sandbox, alive: ExitStack, width: int = 2) -> Sandbox:
    """The sandbox whose game has ended with the most gold; `width` are followed at a time."""
    best, frontier = root, [root]
    while frontier:
        grown = [fork for sandbox in frontier for fork in grow(sandbox, alive)]
        scores = {fork.id: ask(fork, "game.gold, game.path") for fork in grown}
        for fork in grown:
            print(*scores[fork.id])
        grown.sort(key=lambda fork: scores[fork.id], reverse=True)
        if grown and scores[grown[0].id] > ask(best, "game.gold, game.path"):
            best = grown[0]
        for done in {*frontier, *grown[width:]} - {root, best}:
            done.kill()
        frontier = grown[:width]
    return best


def main() -> None:
    snapshot = sys.argv[1] if len(sys.argv) > 1 else "base"
    with ExitStack() as alive:
        root = alive.enter_context(Sandbox.create(snapshot))
        root.eval(GAME)
        best = search(root, alive)
        print("best:", *ask(best, "game.gold, game.path"))
        made = best.branch()
    print(f"it goes on from snapshot {made.tag}")
    with Sandbox.create(made.tag) as later:
        print("still there:", ask(later, "game.room"))


if __name__ == "__main__":
    main()
