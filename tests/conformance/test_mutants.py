"""Remove each check of the second reader, one at a time: some vector must notice."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qmoe_format.conformance import second_reader
from qmoe_format.conformance.runner import Vector, corpus

SOURCE = Path(second_reader.__file__)
TEXT = SOURCE.read_text(encoding="utf-8")

# Checks that no small file needs to get the right answer, and why.
REDUNDANT = {
    "the file has become shorter": "happens only while it is read",
    "number of {part}": "2^20 of them need a file of many MiB",
    "number of shards": "2^20 of them need a file of many MiB",
    "length of the text": "the limit is 2^28",
    "the index begins at {index_offset}": "[F-1] decides where it begins",
    "not a Zstandard frame": "the library rejects it, too",
    "the frame ends within its header": "the library rejects it, too",
    "the frame needs a dictionary": "the library rejects it, too",
    "the frame has more content": "found at the end, too; this check bounds memory",
    "the tree is a single leaf": "no max_length of [D-1] fits it",
    "length_width {header.length_width}": "[E-9] allows no others; this check bounds memory",
    "the extent ends within its 16 bytes": "the length that [G-3] demands is never less",
    "a segment is too short for its weights": "[E-13] finds it; this check bounds memory",
}


CHECKS = {
    node.lineno: node
    for node in ast.walk(ast.parse(TEXT))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require"
}


def words(line: int) -> tuple[str, str]:
    """The requirement (empty if it is not a literal) and the message of a check."""
    _, rule, _, message = CHECKS[line].args
    known = isinstance(rule, ast.Constant)
    return ast.unparse(rule)[1:-1] if known else "", ast.unparse(message).removeprefix("f")[1:-1]


def without(line: int) -> ModuleType:
    """The second reader without the check in this line."""

    class Remove(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.stmt:
            return ast.copy_location(ast.Pass(), node) if node.lineno == line else node

    module = ModuleType("mutant")
    sys.modules["mutant"] = module  # where dataclasses look for it
    exec(compile(Remove().visit(ast.parse(TEXT)), str(SOURCE), "exec"), module.__dict__)
    return module


def answer(reader: ModuleType, vector: Vector) -> tuple[str, str | None]:
    stage: str | None = "open"
    try:
        reader.opened(vector.path)
        stage = "verify"
        reader.contents(vector.path)
    except Exception as error:
        return f"reject:{getattr(error, 'code', error)}", stage
    return "accept", None


@pytest.fixture(scope="module")
def rejected() -> list[Vector]:
    return [vector for vector in corpus() if vector.stage is not None]


@pytest.mark.parametrize("line", sorted(CHECKS), ids=lambda line: "-".join(words(line)))
def test_a_missing_check_is_noticed(line: int, rejected: list[Vector]) -> None:
    rule, message = words(line)
    related = [vector for vector in rejected if not rule or rule in vector.requirements]
    mutant = without(line)
    noticed = any(answer(mutant, vector) != (vector.outcome, vector.stage) for vector in related)
    assert noticed != (message in REDUNDANT), REDUNDANT.get(message, "no vector needs this check")


def test_the_list_of_redundant_checks_is_current() -> None:
    assert set(REDUNDANT) <= {words(line)[1] for line in CHECKS}
