"""The grid ``quantize.grids.Multiples`` in vectors: 32 rows of a column."""

from __future__ import annotations

import numpy as np

from qmoe_format.codec.kernels.jit import inlined
from qmoe_format.quantize.grids import MOST, SKIPPED
from qmoe_format.quantize.kernels.vectors import (
    broadcast,
    floor,
    greater,
    least,
    magnitude,
    where_greater,
    with_sign,
)

_HALF, _ONE, _TWO, _MOST = (np.float32(each) for each in (0.5, 1.0, 2.0, MOST))


@inlined
def rounded(x, value, inverse, squared, first, further, ternary):
    """Levels of x. ``inverse`` is 1 / ``value``, ``squared`` the column's U_ii^2."""
    size = magnitude(x)
    least_reward = first * inverse * squared
    threshold = value + least_reward
    levels = broadcast(_ONE)
    if not ternary:
        step = further * inverse * squared
        for q in range(2, SKIPPED + 1):
            reward = (least_reward + step * np.float32(q - 1)) * np.float32(1 / q)
            threshold = least(value * np.float32(q) + reward, threshold)
        levels = floor(size * inverse + (broadcast(_HALF) - step * inverse * _HALF))
        levels = greater(levels, broadcast(_ONE))
        levels = least(levels, broadcast(_MOST))
    return with_sign(where_greater(size * _TWO, threshold, levels), x)
