"""Which tensors of a checkpoint are experts, and how they group into stacks.

An adapter is data: how one or more model families name their experts. ``find_stacks`` applies it
and refuses every checkpoint in which an expert is missing or would be left unquantised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qmoe_format.errors import QMoEError

EXPERT_DTYPES = ("BF16", "F16", "F32", "F64")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_NUMBER = r"(?P<number>0|[1-9][0-9]{0,8})"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its shard describes it; ``dtype`` is a name of SPEC.md section 3.3."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int

    @property
    def elements(self) -> int:
        """Their number; 1 for a tensor without dimensions."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """``experts`` matrices ``[rows, columns]`` that play one part in one layer.

    Attributes:
        name: the stack's name in a ``.qmoe`` file.
        head, matrix: of which layer's experts it is, and which of their matrices.
        members: the checkpoint's tensor names, ``{}`` for the expert's number; empty if one tensor
            ``name`` of shape ``[experts, rows, columns]`` holds them all.
        transposed: that tensor is ``[experts, columns, rows]``.
    """

    name: str
    head: str
    matrix: str
    members: str
    experts: int
    rows: int
    columns: int
    dtype: str
    transposed: bool = False

    def member(self, expert: int) -> str:
        """The checkpoint's name of the tensor that holds this expert."""
        return self.members.replace("{}", str(expert)) if self.members else self.name


@dataclass(frozen=True)
class Adapter:
    """How model families name their experts.

    Attributes:
        model_types: of ``config.json``.
        head: what all names of a layer's expert tensors have in common, after the layer's name.
        tensor: an expert tensor's name, a format of ``{head}``, ``{number}`` of the expert and
            ``{matrix}``. Without ``{number}`` one tensor holds a matrix of all experts of a layer.
        matrices: the values of ``matrix``, each of which every sparse layer has; in order.
        router: the name of a layer's router after the layer's name; the first dimension of this
            tensor counts the experts.
        transposed: tensors are ``[..., in, out]``; in a ``.qmoe`` file all are ``[..., out, in]``.
        biases: names of further tensors after a head, which are kept as they are.
    """

    model_types: tuple[str, ...]
    head: str
    tensor: str
    matrices: tuple[str, ...]
    router: str
    transposed: bool = False
    biases: tuple[str, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether one tensor holds a matrix of all experts of a layer."""
        return "{number}" not in self.tensor

    def members(self, head: str, matrix: str) -> str:
        """The tensors' names, ``{}`` for the expert's number."""
        return self.tensor.format(head=head, number="{}", matrix=matrix)

    def stack_name(self, head: str, matrix: str) -> str:
        """A stack's name in a ``.qmoe`` file."""
        return self.members(head, matrix) if self.fused else f"{head}.{matrix}"

    def split(self, stack_name: str) -> tuple[str, str] | None:
        """Head and matrix of a stack's name in a ``.qmoe`` file; None if it is none of these."""
        match = self._stack.fullmatch(stack_name)
        return (match["head"], match["matrix"]) if match else None

    def match(self, tensor: str) -> tuple[str, str, int] | None:
        """Head, matrix and number of an expert's tensor, 0 without one; None for others."""
        match = self._expert.fullmatch(tensor)
        if match is None:
            return None
        return match["head"], match["matrix"], 0 if self.fused else int(match["number"])

    def resembles(self, tensor: str) -> bool:
        """Whether a name looks like that of an expert, or of a part of one."""
        return bool(self._similar.fullmatch(tensor)) and not any(
            tensor.endswith(f".{self.head}.{bias}") for bias in self.biases
        )

    def head_beside(self, router: str) -> str | None:
        """The head of the experts that a tensor routes to; None if it is no router."""
        if router == self.router or router.endswith(f".{self.router}"):
            return router.removesuffix(self.router) + self.head
        return None

    @cached_property
    def _expert(self) -> re.Pattern[str]:
        return self._pattern(self.tensor)

    @cached_property
    def _stack(self) -> re.Pattern[str]:
        return self._pattern(self.tensor if self.fused else "{head}.{matrix}")

    @cached_property
    def _similar(self) -> re.Pattern[str]:
        own = self._pattern("{head}.{matrix}").pattern
        return re.compile(rf"(?:.*\.)?experts\..*|{own}[._].*")

    def _pattern(self, name: str) -> re.Pattern[str]:
        parts = {
            "head": rf"(?P<head>(?:.+\.)?{re.escape(self.head)})",
            "number": _NUMBER,
            "matrix": rf"(?P<matrix>{'|'.join(map(re.escape, self.matrices))})",
        }
        pieces = re.split(r"\{(\w+)\}", name)
        return re.compile(
            "".join(
                parts[piece] if place % 2 else re.escape(piece)
                for place, piece in enumerate(pieces)
            )
        )


def find_stacks(
    adapter: Adapter, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[ExpertStack, ...]:
    """Group the experts among ``tensors`` (by name) into stacks, in order of the stacks' names.

    Raises:
        QMoEError: ``checkpoint`` if there are none, if one is missing or superfluous, if those of
            a stack differ in shape or dtype, or if a tensor looks like an expert's and is none.
    """
    found: dict[tuple[str, str], dict[int, TensorInfo]] = {}
    for name, info in tensors.items():
        if match := adapter.match(name):
            head, matrix, number = match
            found.setdefault((head, matrix), {})[number] = info
        elif adapter.resembles(name):
            example = adapter.members(f"….{adapter.head}", adapter.matrices[0])
            raise QMoEError(
                "checkpoint",
                f"tensor {name!r} looks like an expert's, but those of {config['model_type']!r} "
                f"are named like {example.replace('{}', '0')!r}, and it would stay uncompressed; "
                "save the model with transformers, in a float type",
            )
    if not found:
        raise QMoEError(
            "checkpoint",
            f"no expert weights found: a model of type {config['model_type']!r} without sparse "
            "layers has nothing to compress",
        )
    counts = _expected_counts(adapter, tensors, config, {head for head, _ in found})
    stack = _fused_stack if adapter.fused else _stack
    return tuple(
        stack(adapter, head, matrix, found.get((head, matrix), {}), counts[head])
        for head in sorted(counts)
        for matrix in adapter.matrices
    )


def _expected_counts(
    adapter: Adapter,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    heads: Iterable[str],
) -> dict[str, int]:
    """Experts by head: what the config says, else the router; 0 if neither does."""
    routers = {
        head: info.shape[0]
        for name, info in tensors.items()
        if (head := adapter.head_beside(name)) and info.shape
    }
    key = next((key for key in EXPERT_COUNTS if config.get(key) is not None), None)
    configured = config[key] if key else None
    if key and (type(configured) is not int or configured < 1):
        raise QMoEError(
            "checkpoint",
            f"config.json: {key!r} is {configured!r}, not a positive number; correct config.json",
        )
    for head, routed in routers.items():
        if key and configured != routed:
            raise QMoEError(
                "checkpoint",
                f"config.json has {key} = {configured}, but the router beside {head!r} is for "
                f"{routed} experts; they have to agree",
            )
    return {head: configured or routers.get(head, 0) for head in {*heads, *routers}}


def _stack(
    adapter: Adapter, head: str, matrix: str, experts: Mapping[int, TensorInfo], expected: int
) -> ExpertStack:
    members = adapter.members(head, matrix)
    count = max(expected, len(experts), 1)
    for number in range(count):
        if number not in experts:
            raise QMoEError(
                "checkpoint",
                f"expert {number} of {count} is missing: there is no tensor "
                f"{members.replace('{}', str(number))!r}; fetch the whole checkpoint again",
            )
    if expected:
        _check_count(members, len(experts), expected)
    first = experts[0]
    for number in range(count):
        info = experts[number]
        _check_matrices(info, 2)
        if (info.shape, info.dtype) != (first.shape, first.dtype):
            raise QMoEError(
                "checkpoint",
                f"tensor {info.name!r} is {info.dtype} {list(info.shape)}, but {first.name!r} of "
                f"the same layer is {first.dtype} {list(first.shape)}; experts of a layer have to "
                "be alike",
            )
    rows, columns = first.shape
    name = adapter.stack_name(head, matrix)
    return ExpertStack(name, head, matrix, members, count, rows, columns, first.dtype)


def _fused_stack(
    adapter: Adapter, head: str, matrix: str, tensor: Mapping[int, TensorInfo], expected: int
) -> ExpertStack:
    name = adapter.stack_name(head, matrix)
    if not tensor:
        raise QMoEError(
            "checkpoint",
            f"experts are missing: there is no tensor {name!r}; fetch the whole checkpoint again",
        )
    info = tensor[0]
    _check_matrices(info, 3)
    count, rows, columns = info.shape
    if adapter.transposed:
        rows, columns = columns, rows
    _check_count(name, count, expected or max(count, 1))
    return ExpertStack(name, head, matrix, "", count, rows, columns, info.dtype, adapter.transposed)


def _check_count(name: str, count: int, expected: int) -> None:
    if count != expected:
        raise QMoEError(
            "checkpoint",
            f"{name!r}: there are {count} experts, but the number in config.json, or the router, "
            f"says {expected}; correct config.json",
        )


def _check_matrices(info: TensorInfo, dimensions: int) -> None:
    if len(info.shape) != dimensions:
        raise QMoEError(
            "checkpoint",
            f"tensor {info.name!r} has shape {list(info.shape)}, but an expert has to be a matrix: "
            "2 dimensions, or 3 if all experts are in one tensor",
        )
    if info.dtype not in EXPERT_DTYPES:
        raise QMoEError(
            "checkpoint",
            f"tensor {info.name!r} is {info.dtype}, but experts have to be one of "
            f"{', '.join(EXPERT_DTYPES)}; dequantise the checkpoint first",
        )
