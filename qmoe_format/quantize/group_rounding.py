"""Rounding to the nearest of a grid, each group of columns with its own scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qmoe_format.errors import QMoEError
from qmoe_format.quantize.group_weights import GroupWeights, by_column
from qmoe_format.quantize.level_weights import SCALE, Quantized, check_weights

BLOCK_ELEMENTS = 1 << 18  # float32 values that fit in the cache

Round = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Called with some rows of a matrix, float32 or float64 ``[rows, columns]``, and the group size;
returns their codes ``[rows, columns]`` and scales, bfloat16 ``[rows, groups]``."""


def round_batch(
    weights: Tensor, bits: int, round_rows: Round, group_sizes: Sequence[int] | None = None,
    grid: str = "linear",
) -> Quantized:  # fmt: skip
    """Round a batch of matrices; each row independently, so batching changes nothing.

    Args:
        weights: floating ``[experts, rows, columns]``.
        group_sizes: of each expert; None: a row is one group.

    Raises:
        QMoEError: as ``check_weights``; ``value`` if a scale is out of bfloat16's range.
    """
    check_weights(weights)
    experts, rows, columns = weights.shape
    sizes = group_sizes or [0] * experts
    codes = weights.new_empty(weights.shape, dtype=torch.uint8)
    scales = []
    # float32 holds every bfloat16 and float16.
    wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
    block = max(1, BLOCK_ELEMENTS // max(1, columns))
    for expert, size in enumerate(sizes):
        parts = [weights.new_empty((0, groups_of(columns, size)), dtype=SCALE)]
        for start in range(0, rows, block):
            part = slice(start, start + block)
            codes[expert, part], scale = round_rows(weights[expert, part].to(wide), size)
            parts.append(scale)
        scales.append(torch.cat(parts))
    packed = GroupWeights(codes, scales, None, bits, grid, sizes)
    return Quantized(packed, [None] * experts, [None] * experts)


def round_symmetric(bits: int, divisor: float) -> Round:
    """To the nearest multiples of each group's max |w| / ``divisor``.

    There are those by -h to h - 1, with h = 2^(bits - 1). The scale is rounded first: a weight goes
    to the nearest of the values that a reader of the file gets.
    """
    half = 1 << (bits - 1)

    def round_rows(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        scales = stored_scales(group_maxima(w.abs(), group_size) / divisor)
        scale = by_column(scales, group_size, w)
        steps = torch.where(scale > 0, w / scale, 0).round_().clamp_(-half, half - 1)
        return steps.add_(half), scales

    return round_rows


def groups_of(columns: int, group_size: int) -> int:
    """The number of groups of a row."""
    return -(-columns // group_size) if group_size else 1


def group_maxima(values: Tensor, group_size: int) -> Tensor:
    """The greatest of each group of values that are not below 0: ``[rows, groups]``."""
    rows, columns = values.shape
    groups = groups_of(columns, group_size)
    size = group_size or max(columns, 1)
    padded = torch.nn.functional.pad(values, (0, groups * size - columns))
    return padded.view(rows, groups, size).amax(2)


def stored_scales(scales: Tensor) -> Tensor:
    """Scales, none below 0, as a file has them.

    Raises:
        QMoEError: ``value`` if one is out of bfloat16's range.
    """
    stored = scales.to(SCALE)
    if not torch.isfinite(stored).all():
        largest = float(scales.max())
        raise QMoEError("value", f"a scale of {largest:g} is beyond BF16", "rescale the model")
    return stored


def check_choice(recipe: str, name: str, value: int | str, known: Sequence[int | str]) -> None:
    """Refuse an option that a recipe does not have: ``argument``."""
    if value not in known:
        advice = f"choose one of {', '.join(map(str, known))}"
        raise QMoEError("argument", f"recipe {recipe!r} does not have {name} {value!r}", advice)
