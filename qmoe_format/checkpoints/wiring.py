"""How the experts of a model compute, and where they are in transformers' model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.activations import ACT2FN

from qmoe_format.checkpoints.families import family_for
from qmoe_format.errors import QMoEError

_NO_CALIBRATION = "convert the model without calibration text"


@dataclass(frozen=True, slots=True)
class Wiring:
    """How a token goes through an expert: ``output(hidden([m(token) for m in inputs]))``.

    Attributes:
        inputs: the matrices that the token is multiplied by; gate and up in one count as one.
        output: the matrix whose product is the expert's output.
        hidden: from the products with ``inputs``, each [tokens, rows], to what ``output`` is
            multiplied by.
    """

    inputs: tuple[str, ...]
    output: str
    hidden: Callable[[Sequence[Tensor]], Tensor]


def wiring(config: Mapping[str, Any]) -> Wiring:
    """How the experts of the model with this ``config.json`` are wired.

    Raises:
        QMoEError: ``checkpoint`` if the family or its activation is not known.
    """
    family = family_for(config)
    if family.activation is None:
        raise QMoEError(
            "checkpoint",
            f"config.json: models of type {config['model_type']!r} cannot be calibrated",
            _NO_CALIBRATION,
        )
    key, default = family.activation
    name = config.get(key, default)
    if name not in ACT2FN:
        raise QMoEError(
            "checkpoint",
            f"config.json: {key!r} is {name!r}, an activation that transformers does not know",
            f"update transformers, or {_NO_CALIBRATION}",
        )
    activation: Callable[[Tensor], Tensor] = ACT2FN[name]

    def gated(products: Sequence[Tensor]) -> Tensor:
        gate, up = products if len(products) == 2 else products[0].chunk(2, -1)
        return activation(gate) * up

    def plain(products: Sequence[Tensor]) -> Tensor:
        (product,) = products
        return activation(product)

    return Wiring(family.inputs, family.output, gated if family.gated else plain)


Shape = tuple[int, int, int]
"""Experts, out, in."""


def expert_modules(model: Any) -> Iterator[tuple[str, Any, Shape, Shape]]:
    """The experts of each layer of a model that transformers has built.

    Yields:
        Path and module; the shapes of the inputs' matrices, gate and up in one, and of the
        output's.
    """
    family = family_for({"model_type": model.config.model_type})
    for path, module in list(model.named_modules()):
        if not family.is_experts(path):
            continue
        if family.module_sizes:
            experts, rows, columns = (getattr(model.config, key) for key in family.module_sizes)
            yield path, module, (experts, rows, columns), (experts, columns, rows)
        else:
            parameters = (module.gate_up_proj, module.down_proj)
            shapes = [p.mT.shape if module.is_transposed else p.shape for p in parameters]
            yield path, module, *(tuple(shape) for shape in shapes)


def check_experts(where: str, stacks: Mapping[str, Sequence[int]], expected: Shape) -> None:
    """Check stacks against the shape that ``expert_modules`` gives for them.

    Args:
        where: the file or folder, for the message.
        stacks: shapes by name; their rows are below each other in transformers' model.
        expected: the shape there.

    Raises:
        QMoEError: ``checkpoint`` if they differ.
    """
    rows = sum(shape[1] for shape in stacks.values())
    for name, shape in stacks.items():
        if (shape[0], rows, shape[2]) != expected:
            raise QMoEError(
                "checkpoint",
                f"{where}: stack {name!r} has shape {list(shape)}, but by config.json experts are "
                f"{list(expected)}",
                "correct config.json and convert the checkpoint again",
            )
