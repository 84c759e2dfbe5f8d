"""How well a compressed model predicts a text, and what its experts lose against the original's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from qmoe_format.calibration.sequences import Batch
from qmoe_format.checkpoints.model import running
from qmoe_format.errors import QMoEError
from qmoe_format.progress import Counter, Progress
from qmoe_format.runtime.experts import compressed_modules


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean per token and its standard error, estimated from the sequences; both in nats."""

    value: float
    error: float

    @classmethod
    def of(cls, sums: Tensor, tokens: Tensor) -> Mean:
        """From each sequence's sum and number of tokens, both float64 [sequences]."""
        total = tokens.sum()
        mean = sums.sum() / total
        spread = (sums - mean * tokens).square().sum().sqrt() / total
        return cls(float(mean), float(spread))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        tokens: predicted.
        cross_entropy: of the compressed model.
        original: cross-entropy of the model that it was made from; like the following, only if
            that model was given.
        gap: ``cross_entropy`` minus ``original``.
        kl: KL(original ‖ compressed) of the predicted distributions.
        output_errors: relative error of each layer's experts that text reaches, by name of the
            module:
            ``sum |y - y'|² / sum |y|²``, where y is the output of the original's experts and y'
            that of the compressed ones for the same input.
    """

    tokens: int
    cross_entropy: Mean
    original: Mean | None = None
    gap: Mean | None = None
    kl: Mean | None = None
    output_errors: Mapping[str, float] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    model: Any, batches: Sequence[Batch], *, against: Any = None, progress: Progress | None = None
) -> Evaluation:
    """Let a compressed model predict each token from those before it.

    Args:
        model: from ``load_model``.
        batches: from ``calibration.sequences.read_batches``.
        against: the original model, on the same device.
        progress: called after each batch with the number of tokens predicted and to predict.

    Raises:
        QMoEError: ``argument`` if there is nothing to predict; ``checkpoint`` if transformers
            cannot run a model; ``value`` if one predicts NaN; the codes of reading.
    """
    total = sum(int(_targets(batch)[1].sum()) for batch in batches)
    if not total:
        raise QMoEError("argument", "the text has nothing to predict", "give a longer text")
    counter = Counter(progress, total)
    rows: list[Tensor] = []
    with _output_errors(model, against) as errors:
        for batch in batches:
            with running("compressed"):
                found = _logits(model, batch)
            with running("original"):
                expected = against and _logits(against, batch)
            rows.append(_sums(batch, found, expected))
            counter.add(int(rows[-1][:, 0].sum()))
    tokens, loss, original, kl = torch.cat(rows).unbind(1)
    for whose, sums in (("compressed", loss), ("original", original)):
        if sums.isnan().any():
            raise QMoEError(
                "value", f"the {whose} model predicts NaN", "look for NaN in its weights"
            )
    compared = {}
    if against:
        compared = {
            "original": Mean.of(original, tokens),
            "gap": Mean.of(loss - original, tokens),
            "kl": Mean.of(kl, tokens),
        }
    return Evaluation(
        total,
        Mean.of(loss, tokens),
        output_errors={name: float(error / size) for name, (error, size) in errors.items() if size},
        **compared,
    )


def _targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """The tokens to predict, int64 [sequences, length - 1], and which are no padding, bool."""
    tokens = batch.targets or batch.inputs
    return tokens.ids[:, 1:], tokens.attended[:, 1:]


def _logits(model: Any, batch: Batch) -> Tensor:
    """The predictions of ``_targets``: [sequences, length - 1, vocabulary]."""
    arguments = {"input_ids": batch.inputs.ids, "attention_mask": batch.inputs.attended.long()}
    if batch.targets:
        arguments |= {
            "decoder_input_ids": batch.targets.ids,
            "decoder_attention_mask": batch.targets.attended.long(),
        }
    placed = {name: value.to(model.device) for name, value in arguments.items()}
    logits: Tensor = model(**placed, use_cache=False).logits
    return logits[:, :-1]


def _sums(batch: Batch, logits: Tensor, original: Tensor | None) -> Tensor:
    """Of each sequence: tokens, both models' losses and KL, summed, float64 [sequences, 4]."""
    ids, counts = (each.to(logits.device) for each in _targets(batch))
    sums = torch.zeros(len(ids), 4, dtype=torch.float64)
    for row, chosen in enumerate(counts):  # one at a time: the vocabulary may be large
        targets = ids[row][chosen][:, None]
        found = logits[row][chosen].float().log_softmax(-1)
        sums[row, 0] = len(targets)
        sums[row, 1] = -found.gather(1, targets).double().sum()
        if original is not None:
            expected = original[row][chosen].float().log_softmax(-1)
            sums[row, 2] = -expected.gather(1, targets).double().sum()
            sums[row, 3] = kl_div(found, expected, reduction="sum", log_target=True)
    return sums


@contextmanager
def _output_errors(model: Any, against: Any) -> Iterator[dict[str, Tensor]]:
    """While ``against`` runs, sum |y - y'|² and |y|² of each layer's experts, float64 [2]."""
    layers = dict(compressed_modules(model)) if against else {}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in layers}

    def compare(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        error = output.float() - layers[name](*args, **kwargs).float()
        for place, value in enumerate((error, output.float())):
            sums[name][place] += value.square().sum(dtype=torch.float64).cpu()

    with ExitStack() as hooks:
        for name in layers:
            register = against.get_submodule(name).register_forward_hook
            hooks.callback(register(partial(compare, name), with_kwargs=True).remove)
        yield sums


def perplexity(cross_entropy: float) -> float:
    """Its exponential; infinite where that exceeds the range of a float."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf
