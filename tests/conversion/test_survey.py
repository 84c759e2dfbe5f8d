"""What a survey of a block's experts says where weights are zero."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")

from qmoe_format.codec import encode_matrix
from qmoe_format.conversion import Calibration, ConvertOptions
from qmoe_format.conversion.block_experts import BlockExperts, Weights
from qmoe_format.conversion.encoding import dictionaries
from qmoe_format.conversion.survey import LAMBDAS, StackSurvey, survey_block
from qmoe_format.progress import Counter
from tests.conversion.conftest import EXPERTS, Block

ZEROS = [*dictionaries(encode_matrix(np.zeros((1, 1), np.int8), np.zeros((1, 1), np.uint16)))]
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
    return survey_block(experts, OPTIONS, Counter(None, 1))


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
        assert survey.dictionaries == [ZEROS] * len(LAMBDAS)
