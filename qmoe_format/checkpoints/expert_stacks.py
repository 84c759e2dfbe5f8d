"""Which tensors of a checkpoint are experts, and how they group into stacks and layers.

``find_layers`` refuses every checkpoint in which an expert is missing or would stay as it is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_format.checkpoints.expert_layers import ExpertLayer
from qmoe_format.checkpoints.expert_places import Place, Places
from qmoe_format.checkpoints.name_map import NameMap
from qmoe_format.checkpoints.tensor_info import TensorInfo
from qmoe_format.errors import QMoEError

EXPERT_DTYPES = ("BF16", "F16", "F32", "F64")
_NUMBERED = re.compile(
    r"(?P<before>(?:.+\.)?experts\.(?:expert_)?)(?P<number>0|[1-9]\d{0,8})\.(?P<after>.+)"
)
_OF_EXPERTS = re.compile(r"(?:.*\.)?experts\..*")
_DOWNLOAD = "download the whole checkpoint again"


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """One matrix of every expert of a layer: ``experts`` times [rows, columns] of ``dtype``.

    Attributes:
        name: the stack's name in a ``.qmoe`` file.
        members: the checkpoint's tensor names, ``{}`` for the expert's number; empty if one tensor
            ``name`` of shape [experts, rows, columns] holds them all.
        transposed: a matrix is [columns, rows] in the checkpoint.
    """

    name: str
    members: str
    experts: int
    rows: int
    columns: int
    dtype: str
    transposed: bool = False

    def member(self, expert: int) -> str:
        """The checkpoint's name of the tensor that holds this expert."""
        return self.members.replace("{}", str(expert)) if self.members else self.name

    @property
    def weights(self) -> int:
        """In all experts."""
        return self.experts * self.rows * self.columns


@dataclass(frozen=True)
class LayerStacks:
    """The stacks of a layer's experts.

    Attributes:
        path: the name of the experts in transformers' model.
        layer: how they compute. A layer that transformers does not run, such as one that predicts
            further tokens, has that of another layer.
        runs: whether the model runs them.
        inputs: the matrices that a token is multiplied by, the first rows first.
        output: the matrix whose product is an expert's output.
        interleaved: rows of gate and up take turns in ``inputs``, but not in the model.
    """

    path: str
    layer: ExpertLayer
    runs: bool
    inputs: tuple[ExpertStack, ...]
    output: ExpertStack
    interleaved: bool = False

    @property
    def stacks(self) -> tuple[ExpertStack, ...]:
        """All of them, in order of names."""
        return tuple(sorted((*self.inputs, self.output), key=lambda stack: stack.name))

    def hidden(self, products: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> Tensor:
        """From the products with the inputs to what ``output`` is multiplied by.

        Args:
            products: [tokens, rows] for each of ``inputs``.
            biases: none, or [rows] or [tokens, rows] for each.
        """
        if biases:
            products = [each + bias for each, bias in zip(products, biases, strict=True)]
        if self.interleaved:
            products = [torch.cat(list(self.split_rows(each, 2)), -1) for each in products]
        return self.layer.hidden(products)

    def is_silu_gate(self) -> bool:
        """Whether ``hidden`` is silu(gate) * up, gate above up: found by trying."""
        inner = self.output.columns
        if sum(stack.rows for stack in self.inputs) != 2 * inner:
            return False
        product = torch.linspace(-60, 60, 8 * inner).view(4, -1)  # some families have limits
        gate, up = product.chunk(2, -1)
        return torch.equal(self.hidden([product]), torch.nn.functional.silu(gate) * up)

    def split_rows(self, product: Tensor, parts: int) -> Sequence[Tensor]:
        """The rows of gate and up in a product with ``inputs`` [..., rows], if it has both."""
        if self.interleaved or self.layer.interleaved:
            return [product[..., part::parts] for part in range(parts)]
        return product.chunk(parts, -1)

    def join_rows(self, parts: Sequence[Tensor]) -> Tensor:
        """Undo ``split_rows``."""
        if self.interleaved or self.layer.interleaved:
            return torch.stack(list(parts), -1).flatten(-2)
        return torch.cat(list(parts), -1)


def find_layers(
    names: NameMap,
    layers: Sequence[ExpertLayer],
    tensors: Mapping[str, TensorInfo],
    mixed_dtype: str,
) -> tuple[LayerStacks, ...]:
    """Group the experts of a checkpoint.

    Args:
        names: the model's.
        layers: of the model.
        tensors: the checkpoint's, by name.
        mixed_dtype: of a stack whose experts have several dtypes.

    Returns:
        In order of the names of their stacks.

    Raises:
        QMoEError: ``checkpoint`` if there are none, if one is missing or extra, if those of a stack
            differ in shape, or if a tensor looks like an expert's but is not.
    """
    if not layers:
        raise QMoEError(
            "checkpoint",
            f"a model of type {names.model.config.model_type!r} has no experts by its config.json",
            "give a mixture-of-experts model, of a type in `qmoe families`",
        )
    places = Places(names, layers)
    found: list[tuple[Place, ExpertStack]] = []
    members: dict[str, dict[int, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        if match := _NUMBERED.fullmatch(name):
            template = f"{match['before']}{{}}.{match['after']}"
            members[template][int(match["number"])] = info
        elif (place := places.find(name)) is not None:
            found.append((place, _fused_stack(place, info)))
        elif _OF_EXPERTS.fullmatch(name) and names.parameter(name)[0] not in names.shapes:
            raise _not_an_expert(name)
    for template, experts in members.items():
        place = places.find(template.replace("{}", "0"))
        if place is None:
            raise _not_an_expert(next(iter(experts.values())).name)
        found.append((place, _stack(place, template, experts, mixed_dtype)))
    return group(found, layers)


def group(
    found: Iterable[tuple[Place, ExpertStack]], layers: Iterable[ExpertLayer]
) -> tuple[LayerStacks, ...]:
    """Group stacks into layers, and check that every layer of the model has all of them.

    Raises:
        QMoEError: ``checkpoint``.
    """
    by_path: dict[str, list[tuple[Place, ExpertStack]]] = defaultdict(list)
    for place, stack in found:
        by_path[place.path].append((place, stack))
    paths = [layer.path for layer in layers]
    missing = [path for path in paths if path not in by_path]
    if missing:
        others = by_path.keys() - paths
        instead = f", only for {min(others)!r}, which the model does not have" if others else ""
        raise QMoEError(
            "checkpoint",
            f"experts are missing: there are none for {missing[0]!r}{instead}",
            f"{_DOWNLOAD}, or save the model with transformers",
        )
    return tuple(
        sorted(
            (_layer(path, parts) for path, parts in by_path.items()),
            key=lambda layer: layer.stacks[0].name,
        )
    )


def _layer(path: str, parts: Sequence[tuple[Place, ExpertStack]]) -> LayerStacks:
    layer = parts[0][0].layer
    by_matrix: dict[str, list[ExpertStack]] = {}
    for matrix in (layer.inputs, layer.output):
        own = sorted(
            ((place, stack) for place, stack in parts if place.matrix == matrix),
            key=lambda part: part[0].part,
        )
        numbers = [place.part for place, _ in own]
        if numbers != list(range(own[0][0].parts if own else 1)):
            twice = len(set(numbers)) < len(numbers)
            raise QMoEError(
                "checkpoint",
                f"experts are {'there twice' if twice else 'incomplete'}: {path!r} consists of "
                f"{', '.join(repr(stack.name) for _, stack in parts)}",
                f"{_DOWNLOAD}, or save the model with transformers",
            )
        stacks = by_matrix[matrix] = [stack for _, stack in own]
        experts, rows, columns = layer.shapes[matrix]
        total = sum(stack.rows for stack in stacks)
        for stack in stacks:
            if (stack.experts, total, stack.columns) != (experts, rows, columns):
                raise QMoEError(
                    "checkpoint",
                    f"stack {stack.name!r} has shape "
                    f"{[stack.experts, stack.rows, stack.columns]}, but by config.json experts are "
                    f"{[experts, rows // len(stacks), columns]}",
                    "correct config.json, or download the checkpoint again",
                )
    (output,) = by_matrix[layer.output]
    return LayerStacks(
        path,
        layer,
        parts[0][0].runs,
        tuple(by_matrix[layer.inputs]),
        output,
        any(place.interleaved for place, _ in parts),
    )


def _stack(
    place: Place, members: str, experts: Mapping[int, TensorInfo], mixed_dtype: str
) -> ExpertStack:
    count = max(place.layer.shapes[place.matrix][0], len(experts))
    for number in range(count):
        if number not in experts:
            raise QMoEError(
                "checkpoint",
                f"expert {number} of {count} is missing: there is no tensor "
                f"{members.replace('{}', str(number))!r}",
                _DOWNLOAD,
            )
    first = experts[0]
    for info in experts.values():
        _check_expert(info, 2)
        if info.shape != first.shape:
            raise QMoEError(
                "checkpoint",
                f"tensor {info.name!r}: {list(info.shape)}, but {first.name!r} of the same layer "
                f"is {list(first.shape)}",
                "give all experts of a layer the same shape",
            )
    dtypes = {info.dtype for info in experts.values()}
    transposed = place.transposed((count, *first.shape))
    rows, columns = reversed(first.shape) if transposed else first.shape
    name = re.sub(r"\.(?:expert_)?\{\}", "", members).removesuffix(".weight")
    dtype = first.dtype if len(dtypes) == 1 else mixed_dtype
    return ExpertStack(name, members, count, rows, columns, dtype, transposed)


def _fused_stack(place: Place, info: TensorInfo) -> ExpertStack:
    _check_expert(info, 3)
    count, rows, columns = info.shape
    transposed = place.transposed(info.shape)
    if transposed:
        rows, columns = columns, rows
    return ExpertStack(info.name, "", count, rows, columns, info.dtype, transposed)


def _check_expert(info: TensorInfo, dimensions: int) -> None:
    if len(info.shape) != dimensions:
        raise QMoEError(
            "checkpoint",
            f"tensor {info.name!r}: its shape is {list(info.shape)}, but experts of this model "
            f"have {dimensions} dimensions",
            "save the model with transformers",
        )
    if info.dtype not in EXPERT_DTYPES:
        raise QMoEError(
            "checkpoint",
            f"tensor {info.name!r}: is {info.dtype}, but experts have to be one of "
            f"{', '.join(EXPERT_DTYPES)}, or quantized in a format that is known",
            "dequantize the checkpoint first",
        )


def _not_an_expert(name: str) -> QMoEError:
    return QMoEError(
        "checkpoint",
        f"tensor {name!r}: looks like part of an expert, but transformers' model has none of that "
        "name, so it would stay uncompressed",
        "save the model with transformers, in a float type",
    )
