"""How well a compressed model predicts a text, and what its experts lose beside the original's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qmoe_format.calibration.sequences import Batch
from qmoe_format.errors import QMoEError

Progress = Callable[[int, int], None]
"""Called with the tokens done and the tokens there are."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean per token in nats, and its standard error, from the sequences' means."""

    value: float
    error: float

    @classmethod
    def of(cls, sums: Tensor, tokens: Tensor) -> Mean:
        """Of the sequences' sums and numbers of tokens, both float64 ``[sequences]``."""
        total = tokens.sum()
        mean = sums.sum() / total
        spread = (sums - mean * tokens).square().sum().sqrt() / total
        return cls(float(mean), float(spread))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model makes of a text.

    Attributes:
        tokens: that were predicted.
        cross_entropy: of the compressed model.
        original: of the model that it was made from, if that was given; then also
        gap: the difference of the two,
        kl: KL(original ‖ compressed) of their distributions, and
        output_errors: of each layer's experts by the module's name: ``sum |y - y'|² / sum |y|²``,
            with y what the original's return and y' what the compressed ones make of the same.
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
        model: a model that ``load_model`` returned.
        batches: of ``calibration.sequences.read_batches``.
        against: the original model, on the same device.
        progress: told after each batch.

    Raises:
        QMoEError: ``argument`` if there is nothing to predict; ``value`` if what a model predicts
            is NaN; what reading experts finds wrong.
    """
    total = sum(int(_targets(batch)[1].sum()) for batch in batches)
    if not total:
        raise QMoEError("argument", "the text has nothing to predict; give a longer one")
    rows: list[Tensor] = []  # [sequences, 4]: tokens, losses of both, KL
    with _output_errors(model, against) as errors:
        for batch in batches:
            rows.append(_sums(batch, _logits(model, batch), against and _logits(against, batch)))
            if progress:
                progress(int(sum(part[:, 0].sum() for part in rows)), total)
    tokens, loss, original, kl = torch.cat(rows).unbind(1)
    for whose, sums in (("compressed", loss), ("original", original)):
        if sums.isnan().any():
            raise QMoEError(
                "value", f"what the {whose} model predicts is NaN; look for NaN in its weights"
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
        output_errors={name: float(lost / there) for name, (lost, there) in errors.items()},
        **compared,
    )


def _targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """What is to be predicted, int64 ``[sequences, length - 1]``, and which of it counts."""
    read = batch.targets or batch.inputs
    return read.ids[:, 1:], read.attended[:, 1:]


def _logits(model: Any, batch: Batch) -> Tensor:
    """``[sequences, length - 1, vocabulary]``, where ``_targets`` are to be."""
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
    """Of each sequence: tokens, its loss, the original's, KL; float64 ``[sequences, 4]``."""
    ids, counts = (each.to(logits.device) for each in _targets(batch))
    sums = torch.zeros(len(ids), 4, dtype=torch.float64)
    for place in range(
        len(ids)
    ):  # the logarithms of one sequence at a time: vocabularies are large
        chosen = counts[place]
        wanted = ids[place][chosen][:, None]
        found = logits[place][chosen].float().log_softmax(-1)
        sums[place, 0] = len(wanted)
        sums[place, 1] = -found.gather(1, wanted).double().sum()
        if original is not None:
            expected = original[place][chosen].float().log_softmax(-1)
            sums[place, 2] = -expected.gather(1, wanted).double().sum()
            sums[place, 3] = nn.functional.kl_div(
                found, expected, reduction="sum", log_target=True
            ).double()
    return sums


@contextmanager
def _output_errors(model: Any, against: Any) -> Iterator[dict[str, Tensor]]:
    """While ``against`` runs, (lost, there) of each experts module, float64 ``[2]``."""
    sums: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str, compressed: nn.Module) -> None:
        sums[name] = torch.zeros(2, dtype=torch.float64)

        def compare(
            module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor
        ) -> None:
            ours = compressed(*arguments, **named)
            for place, value in enumerate((output.float() - ours.float(), output.float())):
                sums[name][place] += value.square().sum(dtype=torch.float64).cpu()

        original = against.get_submodule(name)
        hooks.append(original.register_forward_hook(compare, with_kwargs=True))

    try:
        if against:
            for name, module in model.named_modules():
                if hasattr(module, "compressed"):
                    watch(name, module)
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def perplexity(cross_entropy: float) -> float:
    """exp of it; infinite where that is too large for a number."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf
