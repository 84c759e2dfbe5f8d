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
    path.write_bytes(parse_dump(block("13.", "qmoe")))
    assert path.read_bytes() == vector.path.read_bytes()
    assert judge(vector, second_reader(path)) is None
    assert judge(vector, package(path)) is None


MATRICES = [
    vector
    for vector in VECTORS.values()
    if vector.stage is None
    and any(tensor["encoding"].startswith("int-") for tensor in vector.contents["tensors"])
    and not vector.path.read_bytes().startswith(SHARDS)
]


@pytest.fixture(scope="module")
def decoder() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block("14.", "python"), "SPEC.md", "exec"), names)
    return names


def test_there_is_something_to_decode() -> None:
    encodings = [tensor["encoding"] for vector in MATRICES for tensor in vector.contents["tensors"]]
    assert min(encodings.count("int-dict"), encodings.count("int-group")) > 100


@pytest.mark.parametrize("vector", MATRICES, ids=lambda vector: vector.id)
def test_the_pseudocode_decodes(vector: Vector, decoder: dict[str, Any]) -> None:
    expected = {tensor["name"]: tensor["parts"] for tensor in vector.contents["tensors"]}
    with File(vector.path) as file:
        tables = [
            decoder["entries"](decode_bytes(file.extent(d.extent), d.encoding, d.bytes, 1))
            for d in file.dictionaries
        ]
        for tensor in file.tensors:
            if tensor.encoding not in ("int-dict", "int-group"):
                continue
            decode = decoder[tensor.encoding.replace("-", "_")]
            arguments = [*tensor.shape[-2:], {"dtype": tensor.dtype, **tensor.keys}]
            arguments += [tables] if tensor.encoding == "int-dict" else []
            for expert, part in enumerate(expected[tensor.name]):
                found = decode(file.extent(tensor.extent + expert), *arguments)
                assert hashlib.sha256(found).hexdigest() == part["sha256"]
