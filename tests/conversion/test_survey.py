"""What is surveyed, and what a survey of a block's experts says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch

from qmoe_format.calibration.sequences import Batch, Tokens
from qmoe_format.codec import encode_matrix
from qmoe_format.conversion import Calibration, ConvertOptions
from qmoe_format.conversion.block_experts import BlockExperts, Weights
from qmoe_format.conversion.encoding import dictionaries
from qmoe_format.conversion.survey import LAMBDAS, StackSurvey, survey_block, text_to_survey
from qmoe_format.progress import Counter
from tests.conversion.conftest import EXPERTS, NORMS, Block

ZEROS = [*dictionaries(encode_matrix(np.zeros((1, 1), np.int8), np.zeros((1, 1), np.uint16)))]
NOTHING = torch.empty(0, dtype=torch.int64), torch.empty(0)
OPTIONS = ConvertOptions(calibration=Calibration("text.txt"), bits_per_weight=1.0)


def surveyed(experts: BlockExperts, zero: set[int]) -> dict[str, StackSurvey]:
    """The survey if these experts were zero."""
    read = experts.weights

    def weights(group: Sequence[int]) -> Weights:
        found = read(group)
        for tensor in found.values():
            tensor[[expert in zero for expert in group]] = 0
        return found

    experts.weights = weights  # type: ignore[method-assign]
    return survey_block(experts, NORMS, OPTIONS, Counter(None, 1))


@pytest.mark.parametrize("zero", [set(), {0}, {1}, {2}, {0, 2}])
def test_samples_are_of_experts_with_weights(block: Block, zero: set[int]) -> None:
    """A cheap bit makes few zeros, unless a sample has nothing else."""
    for survey in surveyed(block("mixtral"), zero).values():
        assert not {*ZEROS} & {*survey.dictionaries[0]}
        for expert, energy in enumerate(survey.energies):
            assert (energy is None) == (expert in zero)


def test_nothing_but_zeros(block: Block) -> None:
    for survey in surveyed(block("mixtral"), set(range(EXPERTS))).values():
        assert survey.energies == [None] * EXPERTS
        assert survey.dictionaries == [ZEROS * EXPERTS] * len(LAMBDAS)


def test_experts_without_tokens_have_the_importance_of_the_others(block: Block) -> None:
    experts = block("mixtral")
    tokens = experts.tokens
    experts.tokens = lambda expert: NOTHING if expert == 1 else tokens(expert)  # type: ignore[method-assign]
    survey_block(experts, NORMS, OPTIONS, Counter(None, 1))
    assert experts.importance is not None
    first, none, last = experts.importance
    assert torch.stack([first, last]).all()
    assert not first.equal(last)
    assert torch.allclose(none, (first + last) / 2)


def test_energies_are_those_of_all_of_the_text(block: Block) -> None:
    whole, part = (
        survey_block(block("mixtral"), NORMS, OPTIONS, Counter(None, 1), share=share)
        for share in (1.0, 0.25)
    )
    for name, survey in whole.items():
        assert part[name].energies == pytest.approx([4 * each for each in survey.energies if each])
        assert part[name].tokens == 4 * survey.tokens
        assert part[name].spread == survey.spread
        assert part[name].sizes == survey.sizes


def some_batches(*lengths: int) -> list[Batch]:
    """Of 100 sequences each."""
    every = (torch.ones(100, length, dtype=torch.bool) for length in lengths)
    return [Batch(Tokens(ones.long(), ones, ones), None) for ones in every]


@pytest.mark.parametrize(
    ("experts", "places"), [(1, [0, 8]), (7, [0, 8]), (49, [0, 4, 8, 12]), (1000, list(range(16)))]
)
def test_what_is_surveyed(experts: int, places: list[int]) -> None:
    """An eighth, or as many batches as give each expert enough tokens."""
    text = some_batches(*[256] * 16)
    batches, share = text_to_survey(text, experts)
    assert [[each is batch for each in text].index(True) for batch in batches] == places
    assert share == len(places) / 16


def test_the_share_is_that_of_the_tokens() -> None:
    assert text_to_survey(some_batches(30, 10), 0)[1] == 0.75
    (text,) = some_batches(30)
    (same,), share = text_to_survey([text], 1)
    assert (same is text, share) == (True, 1.0)


def test_decoders_are_given_enough() -> None:
    """Their tokens are fewer: 8 batches of 2,560 are enough for 10 experts."""
    inputs, targets = some_batches(*[256] * 32), some_batches(*[2560 // 100] * 32)
    text = [Batch(i.inputs, t.inputs) for i, t in zip(inputs, targets, strict=True)]
    assert len(text_to_survey(text, 10)[0]) == 9
