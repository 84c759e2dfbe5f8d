"""Arrays that callers give: checked, or made."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.errors import QMoEError

Shape = tuple[int | None, ...]


def check_array(
    name: str, array: npt.NDArray[Any], dtype: Any, shape: Shape, contiguous: bool = False
) -> None:
    """Refuse an array of another type or shape, in which None is any length: ``argument``."""
    fits = array.shape == shape or (
        array.ndim == len(shape)
        and all(b in (a, None) for a, b in zip(array.shape, shape, strict=True))
    )
    if not fits or array.dtype != dtype or (contiguous and not array.flags.c_contiguous):
        wanted = f"{np.dtype(dtype)} {list(shape)}".replace("None", "n")
        advice = f"give {'contiguous ' if contiguous else ''}{wanted}"
        raise QMoEError("argument", f"{name} is {array.dtype} {list(array.shape)}", advice)


def output(
    out: npt.NDArray[Any] | None, dtype: Any, shape: tuple[int, ...], contiguous: bool
) -> npt.NDArray[Any]:
    """``out``, checked, or a new array."""
    if out is None:
        return np.empty(shape, dtype)
    check_array("out", out, dtype, shape, contiguous)
    return out
