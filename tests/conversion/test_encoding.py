"""How many bytes a matrix takes, told without a file, and what a file has."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch

import qmoe_format
from qmoe_format.checkpoints import ExpertStack
from qmoe_format.codec import PROFILES, EncodedMatrix, dequantize
from qmoe_format.container.inspection import describe
from qmoe_format.conversion.encoding import (
    Matrix,
    begin_stack,
    dictionaries,
    encode,
    expected_bytes,
    stored_bytes,
)
from qmoe_format.quantize.finequant import quantize_finequant
from qmoe_format.quantize.gptq_int import quantize_gptq
from qmoe_format.quantize.group_weights import GroupWeights
from qmoe_format.quantize.hessian import Statistics
from qmoe_format.quantize.level_weights import LevelWeights
from qmoe_format.quantize.moqe import quantize_moqe

EXPERTS, ROWS, COLUMNS = 3, 200, 300
KINDS = ("ternary", "refined", "low and high", "finequant", "gptq", "moqe")


def quantized(kind: str, rows: int = ROWS) -> LevelWeights | GroupWeights:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn((EXPERTS, rows, COLUMNS), generator=generator)
    if kind == "finequant":
        weights[:2, :, ::40] *= 30  # groups of other sizes
        return quantize_finequant(weights).weights
    if kind == "gptq":
        return quantize_gptq(weights, Statistics.zeros(EXPERTS, COLUMNS), 3).weights
    if kind == "moqe":
        return quantize_moqe(weights, 2, "log").weights
    # Experts have dictionaries of their own.
    finer = torch.tensor([0.6, 0.9, 2.0])[:, None, None]
    levels = (finer * weights).round().to(torch.int8)
    if kind != "refined":
        levels.clamp_(-1, 1)
    scales = torch.rand((EXPERTS, rows, 2 if kind == "low and high" else 1), generator=generator)
    columns = torch.rand((EXPERTS, COLUMNS), generator=generator).bfloat16()
    return LevelWeights(levels, scales.bfloat16(), None if kind == "low and high" else columns)


def encoded(weights: LevelWeights | GroupWeights, profile: str) -> list[Matrix]:
    return [encode(weights, place, PROFILES[profile], 1) for place in range(EXPERTS)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("profile", PROFILES)
def test_bytes_are_those_of_a_file(kind: str, profile: str, tmp_path: Path) -> None:
    weights = quantized(kind)
    matrices = encoded(weights, profile)
    stack = ExpertStack("experts", "", EXPERTS, ROWS, COLUMNS, "F32")
    encoding = "int-group" if isinstance(weights, GroupWeights) else "int-dict"
    with (
        qmoe_format.Writer(tmp_path / "m.qmoe") as writer,
        begin_stack(writer, stack, encoding) as experts,
    ):
        for matrix in matrices:
            experts.append(matrix)
    with qmoe_format.open(tmp_path / "m.qmoe") as file:
        file.verify()
        assert sum(map(stored_bytes, matrices)) == file.tensors["experts"].stored_bytes
        for expert, values in enumerate(weights.dequantize()):
            assert values.numpy().tobytes() == file.read_expert("experts", expert).tobytes()
            assert values.numpy().tobytes() == dequantize(matrices[expert]).tobytes()
        total = describe(file)["totals"]["dictionary_bytes"]
    found = {place: size for matrix in matrices for place, size in dictionaries(matrix).items()}
    assert sum(found.values()) == total
    assert bool(found) == (encoding == "int-dict")


def test_a_refined_matrix_has_two_dictionaries() -> None:
    """That of each string counts once, whichever matrices use it."""
    ternary, refined = (encoded(quantized(kind), "fast") for kind in ("ternary", "refined"))
    assert [len(dictionaries(matrix)) for matrix in ternary] == [1, 1, 1]
    assert [len(dictionaries(matrix)) for matrix in refined] == [2, 2, 2]
    for one, other in zip(ternary, refined, strict=True):
        assert dictionaries(one).items() < dictionaries(other).items(), "the mask is the same"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("profile", PROFILES)
def test_some_rows_tell_the_size_of_all(kind: str, profile: str) -> None:
    sample = encoded(quantized(kind, ROWS // 4), profile)
    whole = encoded(quantized(kind), profile)
    for some, every in zip(sample, whole, strict=True):
        close = 0.03 if isinstance(every, EncodedMatrix) else 0
        expected = expected_bytes(some, ROWS, PROFILES[profile])
        assert expected == pytest.approx(stored_bytes(every), rel=close, abs=0)
        assert expected_bytes(every, ROWS, PROFILES[profile]) == stored_bytes(every)
