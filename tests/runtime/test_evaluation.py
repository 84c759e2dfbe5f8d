"""Cross-entropy, KL and output errors against what transformers and the formulas say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from transformers import AutoTokenizer

from qmoe_format import convert, unpack
from qmoe_format.calibration.sequences import Batch, make_batches
from qmoe_format.runtime import load_model
from qmoe_format.runtime.evaluation import Mean, evaluate, perplexity
from tests.refusals import refusal
from tests.tiny_models import WORDS, save_model
from tests.tiny_models import load_model as load_original

FAMILIES = ["llama4_text", "mixtral", "switch_transformers"]
TEXTS = [" ".join(WORDS[i % 60] for i in range(first, first + 50)) for first in (0, 17, 31)]


@pytest.fixture(scope="module", params=FAMILIES)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any, Any, list[Batch]]:
    """Original, compressed, dequantized, and batches, one of them with padding."""
    folder = tmp_path_factory.mktemp("models")
    source = save_model(folder / "checkpoint", request.param)
    file = convert(source, folder / "m.qmoe")
    original = load_original(source)
    compressed = load_model(file, dtype=torch.float32, exact=True)
    dequantized = load_original(unpack(file, folder / "unpacked"))
    batches = make_batches(
        AutoTokenizer.from_pretrained(source),
        original.config.to_dict(),
        TEXTS,
        sequence_length=24,
        batch_size=2,
    )
    return original, compressed, dequantized, batches


def loss_by_transformers(model: Any, batches: list[Batch]) -> float:
    """The model's own loss of each sequence, without padding."""
    total, tokens = 0.0, 0
    for batch in batches:
        for row in range(len(batch.inputs.ids)):
            ids = batch.inputs.ids[row][batch.inputs.attended[row]][None]
            arguments = {"input_ids": ids, "labels": ids}
            count = ids.shape[1] - 1
            if batch.targets:
                target = batch.targets.ids[row][batch.targets.attended[row]][None]
                arguments |= {"decoder_input_ids": target[:, :-1], "labels": target[:, 1:]}
                count = target.shape[1] - 1
            with torch.no_grad():
                total += float(model(**arguments).loss) * count
            tokens += count
    return total / tokens


def test_cross_entropy_is_that_of_transformers(
    models: tuple[Any, Any, Any, list[Batch]],
) -> None:
    _, compressed, dequantized, batches = models
    done: list[tuple[int, int]] = []
    found = evaluate(compressed, batches, progress=lambda *tokens: done.append(tokens))
    assert found.cross_entropy.value == pytest.approx(
        loss_by_transformers(dequantized, batches), rel=1e-5
    )
    assert found.original is None
    assert found.output_errors == {}
    assert done[-1] == (found.tokens, found.tokens)
    assert [tokens for tokens, _ in done] == sorted(tokens for tokens, _ in done)


def test_nothing_is_lost_with_the_same_weights(
    models: tuple[Any, Any, Any, list[Batch]],
) -> None:
    _, compressed, dequantized, batches = models
    found = evaluate(compressed, batches, against=dequantized)
    assert found.gap is not None
    assert found.kl is not None
    assert abs(found.gap.value) < 1e-5
    assert abs(found.kl.value) < 1e-6
    assert found.output_errors
    assert max(found.output_errors.values()) < 1e-9


def test_what_is_lost_against_the_original(models: tuple[Any, Any, Any, list[Batch]]) -> None:
    original, compressed, dequantized, batches = models
    found = evaluate(compressed, batches, against=original)
    assert found.original is not None
    assert found.gap is not None
    assert found.kl is not None
    assert found.original.value == pytest.approx(loss_by_transformers(original, batches), rel=1e-5)
    assert found.gap.value == pytest.approx(found.cross_entropy.value - found.original.value)
    assert found.kl.value > 1e-4

    # Of the last layer's experts, from the dequantized model's own, given the same.
    name = list(found.output_errors)[-1]
    error = size = 0.0

    def compare(module: Any, arguments: Any, named: Any, output: torch.Tensor) -> None:
        nonlocal error, size
        ours = dequantized.get_submodule(name)(*arguments, **named)
        error += float((output - ours).square().sum())
        size += float(output.square().sum())

    hook = original.get_submodule(name).register_forward_hook(compare, with_kwargs=True)
    evaluate(original, batches)
    hook.remove()
    assert found.output_errors[name] == pytest.approx(error / size, rel=1e-4)
    assert 1e-3 < error / size < 3


def test_experts_that_text_does_not_reach_have_no_error(tmp_path: Path) -> None:
    """Those of a vision tower."""
    source = save_model(tmp_path / "checkpoint", "dots3_note")
    compressed = load_model(convert(source, tmp_path / "m.qmoe"), dtype=torch.float32, exact=True)
    original = load_original(source)
    batches = make_batches(AutoTokenizer.from_pretrained(source), {}, TEXTS[:1], sequence_length=24)
    errors = evaluate(compressed, batches, against=original).output_errors
    assert list(errors) == [f"model.language_model.layers.{block}.mlp.experts" for block in (1, 2)]


def test_mean_weighs_tokens() -> None:
    sums, tokens = torch.tensor([2.0, 9.0]).double(), torch.tensor([1.0, 3.0]).double()
    mean = Mean.of(sums, tokens)
    assert mean.value == pytest.approx(11 / 4)
    assert mean.error == pytest.approx(math.hypot(2 - 11 / 4, 9 - 33 / 4) / 4)


def test_perplexity_of_a_hopeless_model_is_infinite() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e4) == math.inf


@pytest.mark.parametrize("whose", ["compressed", "original"])
def test_nan_is_refused(models: tuple[Any, Any, Any, list[Batch]], whose: str) -> None:
    original, compressed, _, batches = models
    bad = compressed if whose == "compressed" else original

    def spoil(module: Any, arguments: Any, output: Any) -> None:
        output.logits.fill_(torch.nan)

    with bad.register_forward_hook(spoil):
        message = refusal(lambda: evaluate(compressed, batches, against=original), "value")
    assert f"the {whose} model predicts NaN" in message


@pytest.mark.parametrize("whose", ["compressed", "original"])
def test_a_model_that_cannot_be_run(models: tuple[Any, Any, Any, list[Batch]], whose: str) -> None:
    original, compressed, _, batches = models

    def fail(module: Any, arguments: Any) -> None:
        raise RuntimeError("selected index k out of range")

    with (compressed if whose == "compressed" else original).register_forward_pre_hook(fail):
        message = refusal(lambda: evaluate(compressed, batches, against=original), "checkpoint")
    assert f"cannot run the {whose} model (selected index k out of range)" in message


def test_hooks_do_not_stay(models: tuple[Any, Any, Any, list[Batch]], tmp_path: Path) -> None:
    original, compressed, _, batches = models
    evaluate(compressed, batches, against=original)
    assert not any(module._forward_hooks for module in original.modules())
