"""The example of SPEC.md is a valid file, and its pseudocode decodes the vectors."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from qmoe_format.conformance.runner import Vector, corpus, judge, package, second_reader
from qmoe_format.conformance.second_reader import SHARDS, File, decode_bytes

SPEC = (Path(__file__).parents[2] / "SPEC.md").read_text(encoding="utf-8")
VECTORS = {vector.id: vector for vector in corpus()}


def block(heading: str, language: str) -> str:
    """The fenced block of a section."""
    section = SPEC[SPEC.index(f"\n## {heading}") :]
    match = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert match
    return match[1]


def parse_dump(text: str) -> bytes:
    """The bytes of an annotated dump, whose offsets must be right."""
    data = b""
    for line in text.splitlines():
        if not re.match(r"[0-9a-f]{3}  ", line):
            assert line == "" or line.startswith("; "), line
            continue
        assert int(line[:3], 16) == len(data), line
        if line[5] == "'":
            data += line[6 : line.rindex("'")].encode("ascii")
            continue
        for token in line[5:].partition(";")[0].split():
            byte, _, times = token.partition("*")
            data += bytes.fromhex(byte) * int(times or 1)
    return data


def test_the_example_is_the_vector(tmp_path: Path) -> None:
    vector = VECTORS["whole-file"]
    path = tmp_path / "example.qmoe"
    path.write_bytes(parse_dump(block("12.", "qmoe")))
    assert path.read_bytes() == vector.path.read_bytes()
    assert judge(vector, second_reader(path)) is None
    assert judge(vector, package(path)) is None


TERNARY = [
    vector
    for vector in VECTORS.values()
    if vector.stage is None
    and any(tensor["encoding"] == "int-dict" for tensor in vector.contents["tensors"])
    and not vector.path.read_bytes().startswith(SHARDS)
]


@pytest.fixture(scope="module")
def decoder() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block("13.", "python"), "SPEC.md", "exec"), names)
    return names


def test_there_is_something_to_decode() -> None:
    assert len(TERNARY) > 60


@pytest.mark.parametrize("vector", TERNARY, ids=lambda vector: vector.id)
def test_the_pseudocode_decodes(vector: Vector, decoder: dict[str, Any]) -> None:
    expected = {tensor["name"]: tensor["parts"] for tensor in vector.contents["tensors"]}
    with File(vector.path) as file:
        tables = [
            decoder["entries"](decode_bytes(file.extent(d.extent), d.encoding, d.bytes, 1), d.signs)
            for d in file.dictionaries
        ]
        for tensor in file.tensors:
            if tensor.encoding != "int-dict":
                continue
            keys = {"dtype": tensor.dtype, **tensor.keys}
            for expert, part in enumerate(expected[tensor.name]):
                extent = file.extent(tensor.extent + expert)
                found = decoder["matrix"](extent, *tensor.shape[-2:], keys, tables)
                assert hashlib.sha256(found).hexdigest() == part["sha256"]
