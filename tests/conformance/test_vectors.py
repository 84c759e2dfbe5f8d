"""Both readers on every vector; what the vectors cover; that they can be regenerated."""

from __future__ import annotations

import re
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from qmoe_format.conformance import second_reader
from qmoe_format.conformance.runner import (
    HERE,
    Vector,
    corpus,
    judge,
    package,
    sentences,
)
from qmoe_format.conformance.runner import second_reader as read_second
from tools.conformance_vectors.__main__ import SPEC_VERSION, write

SPEC = Path(__file__).parents[2] / "SPEC.md"
VECTORS = corpus()

# Requirements that no file can violate, and why.
NOT_IN_A_FILE = {
    "A-2": "advice to a writer",
    "M-1": "about a product, not a file",
    "M-2": "about a product, not a file",
    "M-3": "about a product, not a file",
    "W-1": "about a writer",
    "W-2": "about a writer",
    "W-3": "about a writer",
}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.id)
def test_second_reader(vector: Vector) -> None:
    assert judge(vector, read_second(vector.path)) is None


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.id)
def test_package(vector: Vector) -> None:
    assert judge(vector, package(vector.path)) is None


@pytest.mark.parametrize(
    "vector", [vector for vector in VECTORS if vector.stage], ids=lambda vector: vector.id
)
def test_the_second_reader_names_a_requirement_of_the_vector(vector: Vector) -> None:
    with pytest.raises(second_reader.Rejected) as caught:
        second_reader.contents(vector.path)
    assert caught.value.requirement in vector.requirements


@pytest.mark.parametrize(
    "vector",
    [vector for vector in VECTORS if "N-3" in vector.requirements],
    ids=lambda vector: vector.id,
)
def test_hostile_numbers_cost_no_memory(vector: Vector) -> None:
    tracemalloc.start()
    try:
        read_second(vector.path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_second_reader_imports_nothing_from_the_package() -> None:
    assert not re.search(r"import.*qmoe|qmoe.*import", Path(second_reader.__file__).read_text())


def test_generating_the_vectors_again_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path)
    made = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*") if path.is_file()}
    kept = {path.relative_to(HERE): path for path in (HERE / "vectors").rglob("*")}
    kept = {name: path for name, path in kept.items() if path.is_file()}
    kept[Path("manifest.json")] = HERE / "manifest.json"
    assert made.keys() == kept.keys()
    different = [name for name in made if made[name].read_bytes() != kept[name].read_bytes()]
    assert different == []


def test_the_manifest_names_this_version_of_the_specification() -> None:
    version = re.search(r"\*\*Version (\d+\.\d+)", SPEC.read_text(encoding="utf-8"))
    assert version
    assert version[1] == SPEC_VERSION
    assert max(Counter(vector.id for vector in VECTORS).values()) == 1


def test_the_whole_set_is_small() -> None:
    files = [path for path in (HERE / "vectors").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in [*files, HERE / "manifest.json"]) < 1_800_000


def test_every_requirement_has_a_vector() -> None:
    defined = set(re.findall(r"`\[([A-Z]-\d+)\]`(?= )", SPEC.read_text(encoding="utf-8")))
    assert defined >= set(sentences())
    covered = {requirement for vector in VECTORS for requirement in vector.requirements}
    assert covered <= defined, "not a requirement of SPEC.md"
    assert defined - covered == set(NOT_IN_A_FILE)


def test_every_requirement_that_a_file_can_violate_has_a_rejected_vector() -> None:
    only_accepted = {
        "E-12",
        "G-6",
        "G-7",
        "G-8",
        "N-1",
        "T-4",
        "V-1",
        "V-2",
        "V-3",
        "Z-1",
    }
    rejected = {name for vector in VECTORS if vector.stage for name in vector.requirements}
    accepted = {name for vector in VECTORS if not vector.stage for name in vector.requirements}
    assert accepted - rejected == only_accepted


def test_every_code_occurs() -> None:
    text = SPEC.read_text(encoding="utf-8")
    table = text[text.index("| code | meaning |") : text.index("## 2.")]
    codes = set(re.findall(r"^\| `([a-z]+)` \|", table, re.MULTILINE))
    assert len(codes) == 12
    assert {vector.outcome for vector in VECTORS} == {"accept", *(f"reject:{c}" for c in codes)}
