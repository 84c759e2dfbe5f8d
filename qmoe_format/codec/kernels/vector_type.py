"""The type of LLVM's vectors in Numba, which has none."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

_ELEMENTS = {"float32": ir.FloatType(), "int32": ir.IntType(32)}


class Vector(types.Type):  # type: ignore[misc]
    """``count`` elements, ``float32`` or ``int32``."""

    def __init__(self, element, count):
        self.llvm = ir.VectorType(_ELEMENTS[element], count)
        super().__init__(f"{element}x{count}")


@register_model(Vector)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager, of):
        super().__init__(manager, of, of.llvm)
