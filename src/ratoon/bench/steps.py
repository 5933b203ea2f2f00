"""The chain that is built and probed: modules under /opt/agent, each using the one before."""

from __future__ import annotations

from dataclasses import dataclass

from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import RatoonError

DEEPEST = 32


def _module(step: int) -> str:
    below = f"import step{step - 1} as s\n" if step > 1 else ""
    signature = f"s.SIGNATURE + '-{step}'" if step > 1 else "'1'"
    return f"{below}SIGNATURE = {signature}\ndef answer(): return {step}\n"


STEPS = {step: _module(step) for step in range(1, DEEPEST + 1)}
SIGNATURES = {step: "-".join(map(str, range(1, step + 1))) for step in STEPS}


@dataclass(frozen=True)
class Head:
    """A snapshot to fork from: its parent, the steps it adds, and those its forks must have."""

    tag: str
    parent: str | None
    adds: tuple[int, ...]
    has: tuple[int, ...]


HEADS = (
    Head("base", None, (), ()),
    Head("L1", "base", (1,), (1,)),
    Head("L2", "L1", (2,), (1, 2)),
    Head("L3", "L2", (3,), (1, 2, 3)),
    Head("Flat", "base", (1, 2, 3), (1, 2, 3)),
)
LARGE_HEADS = (
    Head("base-2g", None, (), ()),
    Head("L1-2g", "base-2g", (1,), (1,)),
    Head("L2-2g", "L1-2g", (2,), (1, 2)),
    Head("L3-2g", "L2-2g", (3,), (1, 2, 3)),
)


def link_command(steps: tuple[int, ...]) -> list[str]:
    """Write the modules of `steps` under /opt/agent, and check that they work."""
    lines = ["import os, sys", "os.makedirs('/opt/agent', exist_ok=True)"]
    for step in steps:
        lines.append(f"open('/opt/agent/step{step}.py', 'w').write({STEPS[step]!r})")
    last = steps[-1]
    lines.append(f"sys.path.insert(0, '/opt/agent'); import step{last}")
    lines.append(f"assert step{last}.SIGNATURE == {SIGNATURES[last]!r}")
    return ["python3", "-c", "\n".join(lines)]


def probe_command(steps: tuple[int, ...]) -> list[str]:
    """Print one line a step: `ok N` if its module is there and says what it should."""
    script = (
        "import importlib, sys\n"
        "sys.path.insert(0, '/opt/agent')\n"
        f"for step, signature in {[(step, SIGNATURES[step]) for step in steps]!r}:\n"
        "    try:\n"
        "        module = importlib.import_module(f'step{step}')\n"
        "        right = module.SIGNATURE == signature and module.answer() == step\n"
        "    except ImportError:\n"
        "        right = False\n"
        "    print('ok' if right else 'missing', step)\n"
    )
    return ["python3", "-c", script]


def passed(stdout: str, steps: tuple[int, ...], where: str) -> int:
    """How many probes passed, of what `probe_command` printed; an error if they did not all run."""
    lines = stdout.splitlines()
    if [line.split()[-1] for line in lines] != [str(step) for step in steps]:
        raise RatoonError(f"the probes did not run in {where}: {stdout!r}")
    return sum(line.startswith("ok ") for line in lines)


async def probe(sandbox: Sandbox, steps: tuple[int, ...]) -> int:
    """How many of the steps' probes pass in this fork; an error if they did not all run."""
    result = await sandbox.exec(probe_command(steps), timeout=60)
    return passed(result.stdout.decode(), steps, sandbox.id)
