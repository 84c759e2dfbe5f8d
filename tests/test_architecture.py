"""The rooms of the package stand on each other in one order, without circles."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import qmoe_format

PACKAGE = Path(qmoe_format.__file__).parent

# From the ground up. A module may import from its own line and from those above it; of the modules
# at the package's root, the ones that everything stands on come first.
ROOMS = (
    "_version",
    "errors",
    "dtypes machine remote atomic_file progress",
    "codec",
    "container quantize gpu",
    "hub",
    "checkpoints",
    "calibration",
    "conversion export",
    "runtime",
    "cli",
    "conformance __main__",
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms.split()}


def modules() -> dict[str, Path]:
    """Every module by its dotted name without ``qmoe_format.``; the root is ``""``."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The package's modules that a file imports, at its top, in a function or for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            submodule = [name.removeprefix("qmoe_format.") in known for name in inner]
            names = [
                name if sub else str(node.module)
                for name, sub in zip(inner, submodule, strict=True)
            ]
        found |= {
            name.removeprefix("qmoe_format").removeprefix(".")
            for name in names
            if name.partition(".")[0] == "qmoe_format"
        }
    return found


KNOWN = modules()
GRAPH = {name: imports(path, set(KNOWN)) for name, path in KNOWN.items() if name}


def test_every_room_has_a_floor() -> None:
    assert {name.partition(".")[0] for name in GRAPH} == set(FLOOR)


def test_imports_point_down() -> None:
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if other and FLOOR[other.partition(".")[0]] > FLOOR[name.partition(".")[0]]
    ]
    assert upward == []


def test_only_the_conformance_runner_uses_the_package_as_its_users_do() -> None:
    assert {name for name, others in GRAPH.items() if "" in others} == {"conformance.runner"}


def test_there_is_no_circle() -> None:
    tuple(TopologicalSorter(GRAPH).static_order())


def test_few_files_lie_at_the_root() -> None:
    assert len([path for path in PACKAGE.glob("*.py") if path.stem[0] != "_"]) <= 5
