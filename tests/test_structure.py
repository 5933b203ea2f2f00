"""How the package is built: who may know whom, how long a module is, and the tree of errors."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ratoon
from ratoon import errors
from ratoon.daemon import problems

ROOT = Path(ratoon.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
GUEST = "ratoon.machine.guest"
#: What the guest has of it, and what of that runs on the host too.
AGENT, SHARED = f"{GUEST}.agent", f"{GUEST}.shared"

#: Who is above whom; what shares a line is side by side. A package sees itself and what is below.
STOREYS = [
    {"__main__"},
    {"cli"},
    {"bench"},
    {"client"},
    {"daemon"},
    {"engine"},
    {"machine"},
    {"store"},
    {"jail"},
    {"artifacts"},
    {"documents"},
    {
        *("api", "compression", "concurrency", "files", "paths", "syscalls", "units"),
        *("validation", "version"),
    },
    {"errors"},
]
#: The same of the packages within a storey.
ROOMS = {
    "engine": [{"startup"}, {"sandbox"}, {"sources"}],
    "machine": [{"host", "volumes"}, {"guest", "vmm"}, {"network"}],
    "store": [{"check", "pack"}, {"snapshot"}, {"disk", "memory"}],
}


def name_of(path: Path) -> str:
    parts = ("ratoon", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module that `path` imports, wherever in it, by its full name."""
    module = name_of(path).split(".")
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from ratoon import files` imports a module, `from ratoon.files import x` a name.
            for alias in node.names:
                child = f"{source}.{alias.name}"
                yield child if is_module(child) else source


def is_module(name: str) -> bool:
    path = ROOT.parent / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def parts_of(module: str) -> list[str]:
    """Where a module is: the names below `ratoon` on the way to it."""
    first, *rest = module.split(".")
    return rest if first == "ratoon" else []


def level_of(part: str, levels: list[set[str]]) -> int:
    (level,) = (number for number, parts in enumerate(levels) if part in parts)
    return level


def test_every_part_has_its_place() -> None:
    places = [parts_of(name_of(path)) for path in MODULES]
    assert {place[0] for place in places if place} == set().union(*STOREYS)
    for storey, levels in ROOMS.items():
        rooms = {place[1] for place in places if place[0:1] == [storey] and place[1:]}
        assert rooms == set().union(*levels)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    """Those for types alone count as well."""
    module = name_of(path)
    here = parts_of(module)
    if not here:
        return  # the front door: it may show whatever there is
    for imported in imports(path):
        there = parts_of(imported)
        if not there:
            continue
        levels, names = STOREYS, (here[0], there[0])
        if here[0] == there[0]:
            if here[0] not in ROOMS or not here[1:] or not there[1:] or here[1] == there[1]:
                continue
            levels, names = ROOMS[here[0]], (here[1], there[1])
        above, below = (level_of(name, levels) for name in names)
        assert below > above, f"{module} must not know {imported}"


def test_there_are_no_circles() -> None:
    """Not among modules either, and not for types: each can be read before what uses it."""
    known = {name_of(path) for path in MODULES}
    needs = {name_of(path): known.intersection(imports(path)) - {name_of(path)} for path in MODULES}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    "path", [path for path in MODULES if name_of(path).startswith((AGENT, SHARED))], ids=name_of
)
def test_the_agent_stands_alone(path: Path) -> None:
    """It runs on a bare interpreter, under another name: no imports but the standard library's."""
    known = (AGENT, SHARED) if name_of(path).startswith(AGENT) else SHARED
    for imported in imports(path):
        if imported.startswith("ratoon"):
            assert imported.startswith(known)
        else:
            assert imported.partition(".")[0] in sys.stdlib_module_names
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ratoon"):
            raise AssertionError(f"{path.name} names the agent's package as it is on the host")


@pytest.mark.parametrize(
    "path", [path for path in MODULES if not name_of(path).startswith(AGENT)], ids=name_of
)
def test_the_host_has_nothing_of_the_agent(path: Path) -> None:
    """What both need is in the package whose name says so."""
    assert not [imported for imported in imports(path) if imported.startswith(AGENT)]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_one_concept(path: Path) -> None:
    """What it is says its docstring; this only finds those that are two by their length alone."""
    assert len(path.read_text().splitlines()) <= 800


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text))


# Errors ---------------------------------------------------------------------------------------

_LINE = re.compile(
    r"^(?P<indent>[ │]*)(?:[├└]── )?(?P<name>[A-Z]\w+)"
    r"(?: +exit (?P<exit>\d), HTTP (?P<http>\d{3}))?(?:  .*)?$"
)


def drawn() -> dict[str, tuple[str | None, int, int]]:
    """The tree in the docstring: each error's parent, exit code and HTTP status."""
    tree: dict[str, tuple[str | None, int, int]] = {}
    above: list[str] = []
    drawing = (errors.__doc__ or "").split("::\n\n", 1)[1].split("\n\n", 1)[0]
    for line in drawing.splitlines():
        match = _LINE.match(line.removeprefix("    "))
        assert match, line
        depth = 0 if "──" not in line else len(match["indent"]) // 4 + 1
        above = above[:depth]
        parent = above[-1] if above else None
        codes = (
            (int(match["exit"]), int(match["http"])) if match["exit"] else tree[parent or ""][1:]
        )
        tree[match["name"]] = (parent, *codes)
        above.append(match["name"])
    return tree


def defined() -> dict[str, tuple[str | None, int, int]]:
    """The same of the classes themselves."""
    tree = {}
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.RatoonError):
            (parent,) = value.__bases__
            base = None if parent is Exception else parent.__name__
            tree[name] = (base, value.exit_code, value.http_status)
    return tree


def test_the_drawing_of_the_errors_is_true() -> None:
    assert drawn() == defined()


def documented(page: str, heading: str) -> set[int]:
    """The numbers in the first column of the table below a heading."""
    text = (ROOT.parents[1] / page).read_text()
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (\d+(?:, \d+)*) \|", section, re.MULTILINE)
    return {int(number) for row in rows for number in row.split(", ")}


def test_the_documents_have_every_exit_code_and_status() -> None:
    codes = {code for _, code, _ in defined().values()}
    assert documented("docs/cli.md", "Exit codes") == codes | {0, 130}
    statuses = {status for _, _, status in defined().values()}
    assert statuses | {413, 422, 504} == documented("docs/http.md", "Errors")
    assert documented("docs/http.md", "Errors") == set(problems.MEANINGS)


def test_no_error_is_defined_elsewhere() -> None:
    """One tree, and it is drawn whole: whoever handles errors need read one module."""
    known = set(defined())
    for path in MODULES:
        if path.name == "errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                assert not bases & known, f"{node.name} in {name_of(path)}"
