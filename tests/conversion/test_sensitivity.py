"""What an error in each block does to predictions, and the prices that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qmoe_format.calibration.sequences import Batch, Tokens
from qmoe_format.calibration.walk import Walk
from qmoe_format.checkpoints import Checkpoint, open_checkpoint
from qmoe_format.conversion import sensitivity
from qmoe_format.conversion.block_experts import BlockExperts
from qmoe_format.conversion.parallel import Resources
from qmoe_format.conversion.sensitivity import NOISE, Probes
from qmoe_format.conversion.survey import POWER, StackSurvey, with_prices


@pytest.fixture
def checkpoint(mixtral_folder: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(mixtral_folder) as opened:
        yield opened


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (7, 12):
        ids = torch.randint(5, 20, (8, length), generator=generator)
        attended = torch.ones_like(ids, dtype=torch.bool)
        attended[-1, length // 2 :] = False
        found.append(Batch(Tokens(ids, attended, attended), None))
    return found


def walked(checkpoint: Checkpoint, probes: Probes, folder: Path) -> Walk:
    """A walk through the original model to the end, with noise in the probes."""
    walk = Walk(checkpoint, probes.batches, folder)
    walk.start()
    layers = [layer for layer in checkpoint.layers if layer.runs]
    for block in walk.blocks:
        outputs = None
        if routed := walk.collect():
            assert block.experts
            experts = BlockExperts(checkpoint, block.experts, routed, Resources(1), token_cap=100.0)
            outputs = routed.outputs()
            for group in experts.groups():
                experts.add_outputs(experts.weights(group), group, outputs)
            norms = torch.ones(len(outputs), 1)
            probes.disturb(outputs, norms, walk.counts, layers.index(block.experts))
        walk.advance(outputs)
    return walk


def test_a_copy_without_noise_predicts_what_the_model_does(
    checkpoint: Checkpoint, mixtral_folder: Path, tmp_path: Path
) -> None:
    probes = Probes(batches(), len(checkpoint.layers), 16)
    walk = walked(checkpoint, probes, tmp_path)
    tokens = probes.batches[-1].inputs
    model = AutoModelForCausalLM.from_pretrained(mixtral_folder, dtype=torch.float32).eval()
    with torch.no_grad(), walk.head() as head:
        wanted = model(tokens.ids, attention_mask=tokens.attended.long()).logits[tokens.attended]
        found = head(walk.output(len(probes.batches) - len(checkpoint.layers) - 1))
    assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)


def test_noise_does_something_in_every_block(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = Probes(batches(), len(checkpoint.layers), 16)
    found = probes.sensitivities(walked(checkpoint, probes, tmp_path))
    assert len(found) == len(checkpoint.layers)
    assert all(each > 0 for each in found)
    # Twice the noise does four times as much: the figures are those of an error of one size.
    monkeypatch.setattr(sensitivity, "NOISE", 2 * NOISE)
    again = probes.sensitivities(walked(checkpoint, probes, tmp_path))
    assert again == pytest.approx(found, rel=0.3)


def test_noise_is_in_the_copy_of_its_block_only() -> None:
    probes, counts = Probes(batches(), 2, 16), [4, 5, 3, 3, 3]
    norms = torch.arange(1.0, 19.0)[:, None]
    for block in range(2):
        outputs = torch.zeros(18, 1024)
        probes.disturb(outputs, norms, counts, block)
        own = slice(12 + 3 * block, 15 + 3 * block)
        noise = outputs[own].norm(dim=1, keepdim=True)
        assert torch.allclose(noise, NOISE * norms[own], rtol=0.15)
        outputs[own] = 0
        assert not outputs.any()


def test_no_token_of_a_copy_counts() -> None:
    probes = Probes(batches(), 3, 16)
    assert len(probes.batches) == 2 + 4
    assert not any(batch.inputs.counted.any() for batch in probes.batches[2:])
    assert all(len(batch.inputs.ids) == 1 for batch in probes.batches[2:])  # a quarter of 16, of 4


def surveys(checkpoint: Checkpoint, energies: list[float]) -> dict[str, StackSurvey]:
    return {
        stack.name: StackSurvey(100, [energy] * stack.experts, [0.0] * 4, [], [], 0.0)
        for layer, energy in zip(checkpoint.layers, energies, strict=True)
        for stack in layer.stacks
    }


def prices(checkpoint: Checkpoint, energies: list[float], found: list[float]) -> Tensor:
    """Of each layer, whose stacks have one."""
    layers = checkpoint.layers
    measured = {layer.path: each for layer, each in zip(layers, found, strict=True)}
    priced = with_prices(surveys(checkpoint, energies), layers, measured)
    by_layer = [{priced[stack.name].price for stack in layer.stacks} for layer in layers]
    assert all(len(each) == 1 for each in by_layer)
    return torch.tensor([each.pop() for each in by_layer])


def test_blocks_whose_errors_do_more_get_more_bits(checkpoint: Checkpoint) -> None:
    others = [1.0] * (len(checkpoint.layers) - 1)
    equal = prices(checkpoint, [1.0, *others], [3.0, *(3.0 for _ in others)])
    assert torch.allclose(equal, torch.ones_like(equal))
    sensitive = prices(checkpoint, [1.0, *others], [4.0, *others])
    assert sensitive[0] / sensitive[1] == pytest.approx(4**-POWER)
    energetic = prices(checkpoint, [4.0, *others], [1.0, *others])
    assert energetic[0] < energetic[1]
    unknown = prices(checkpoint, [1.0, *others], [0.0, *others])
    assert unknown[0] == 1
