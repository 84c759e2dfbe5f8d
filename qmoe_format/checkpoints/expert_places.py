"""Where a tensor of experts belongs in transformers' model, by transformers' rules for names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
)

from qmoe_format.checkpoints.expert_layers import ExpertLayer
from qmoe_format.checkpoints.name_map import NameMap
from qmoe_format.errors import QMoEError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stack belongs.

    Attributes:
        path: the name of the experts in transformers' model.
        layer: how they compute; another layer's if the model does not run these.
        matrix: the layer's name of the matrix.
        part, parts: the number of the stack among those that make up the matrix.
        operations: what transformers does with it.
    """

    path: str
    layer: ExpertLayer
    matrix: str
    part: int
    parts: int
    operations: Sequence[ConversionOps]

    @property
    def runs(self) -> bool:
        """Whether the model runs the layer."""
        return self.path == self.layer.path

    @property
    def interleaved(self) -> bool:
        """Whether transformers sorts the rows of gate and up, which take turns."""
        return any(isinstance(each, Interleave) for each in self.operations)

    def transposed(self, shape: Sequence[int]) -> bool:
        """Whether a matrix of a stack of this shape [experts, _, _] is [in, out]."""
        transposed = self.layer.transposed
        experts, rows, columns = self.layer.shapes[self.matrix]
        parameter = (experts, columns, rows) if transposed else (experts, rows, columns)
        for each in self.operations:
            if isinstance(each, Transpose) and not (each.check_dims and tuple(shape) == parameter):
                transposed = not transposed
        return transposed


class Places:
    """Finds the place of each tensor of experts."""

    def __init__(self, names: NameMap, layers: Iterable[ExpertLayer]) -> None:
        self._names = names
        self._parameters = {
            name: (layer, matrix)
            for layer in layers
            for matrix in (layer.inputs, layer.output)
            for name in layer.members(matrix)[:1]
        }
        # Blocks that the model does not have end in the same names.
        self._tails = {_tail(target): target for target in self._parameters}
        self._blocks = {_block(target) for target in self._tails.values()}

    def find(self, name: str) -> Place | None:
        """The place of a tensor, the first expert's if each has one; None if it is no expert's.

        Raises:
            QMoEError: ``checkpoint`` if transformers does something with it that is not known here.
        """
        target, converter, pattern = self._names.parameter(name)
        if target in self._parameters:
            known, block = target, _block(target)
        elif target in self._names.shapes:
            return None
        elif _tail(target) in self._tails:
            known, block = self._tails[_tail(target)], _block(target)
        else:  # some rules are for one part of the model: as if the block were there
            inside = (self._names.parameter(f"{each}{_tail(name)}") for each in self._blocks)
            found = next((each for each in inside if each[0] in self._parameters), None)
            if found is None:
                return None
            known, converter, pattern = found
            block = _block(name)
        layer, matrix = self._parameters[known]
        path = f"{block}{layer.path.removeprefix(_block(known))}"
        operations = converter.operations if converter else ()
        columns = 2 if layer.transposed else 1
        for each in operations:
            good = isinstance(each, Transpose) and {each.dim0, each.dim1} == {1, 2}
            good |= isinstance(each, MergeModulelist) and each.dim == 0
            good |= isinstance(each, Concatenate) and each.dim == columns
            # Biases would have to be sorted likewise, but no model has both.
            good |= isinstance(each, Interleave) and each.dim == columns and not layer.biases
            if not good:
                raise QMoEError(
                    "checkpoint",
                    f"tensor {name!r}: transformers prepares it with {each}, which is not known",
                    "save the model with transformers, and convert that",
                )
        patterns = converter.source_patterns if converter else [pattern]
        return Place(path, layer, matrix, patterns.index(pattern), len(patterns), operations)


def _tail(target: str) -> str:
    """A parameter's name within its block: what follows the first number."""
    parts = re.split(r"(?<=\.)(\d+\.)", target, maxsplit=1)
    return parts[-1] if len(parts) > 1 else target


def _block(target: str) -> str:
    """What precedes the tail."""
    return target.removesuffix(_tail(target))
