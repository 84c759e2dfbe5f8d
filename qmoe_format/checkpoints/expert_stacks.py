"""Which tensors of a checkpoint are experts, and how they group into stacks.

``find_stacks`` refuses every checkpoint in which an expert is missing or would be left unquantized.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qmoe_format.checkpoints.family import Family
from qmoe_format.errors import QMoEError

EXPERT_DTYPES = ("BF16", "F16", "F32", "F64")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_DOWNLOAD = "download the whole checkpoint again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the weight file number ``shard`` describes it; ``dtype`` as in SPEC.md 3.3."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """One matrix of every expert of a layer: ``experts`` times [rows, columns] of ``dtype``.

    Attributes:
        name: the stack's name in a ``.qmoe`` file.
        prefix: the part of the name that all stacks of the layer share.
        matrix: the name of the matrix in its ``Family``.
        members: the checkpoint's tensor names, ``{}`` for the expert's number; empty if one tensor
            ``name`` of shape [experts, rows, columns] holds them all.
        transposed: that one tensor is [experts, columns, rows].
    """

    name: str
    prefix: str
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


def find_stacks(
    family: Family, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[ExpertStack, ...]:
    """Group the experts of a checkpoint into stacks.

    Args:
        family: of the model.
        tensors: the checkpoint's, by name.
        config: the contents of ``config.json``.

    Returns:
        The stacks, in order of layers' prefixes, then of matrices.

    Raises:
        QMoEError: ``checkpoint`` if there are none, if one is missing or extra, if those of a stack
            differ in shape or dtype, or if a tensor looks like an expert's but is not.
    """
    expert = _pattern(family, family.tensor)
    similar = re.compile(
        rf"(?:.*\.)?experts\..*|{_pattern(family, '{prefix}.{matrix}').pattern}[._].*"
    )
    biases = tuple(f".{family.prefix}.{bias}" for bias in family.biases)
    found: dict[tuple[str, str], dict[int, TensorInfo]] = {}
    for name, info in tensors.items():
        if match := expert.fullmatch(name):
            number = 0 if family.fused else int(match["number"])
            found.setdefault((match["prefix"], match["matrix"]), {})[number] = info
        elif similar.fullmatch(name) and not name.endswith(biases):
            example = family.members(f"….{family.prefix}", family.matrices[0]).replace("{}", "0")
            raise QMoEError(
                "checkpoint",
                f"tensor {name!r}: looks like part of an expert, but those of "
                f"{config['model_type']!r} have names like {example!r}, so it would stay "
                "uncompressed",
                "save the model with transformers, in a float type",
            )
    if not found:
        raise QMoEError(
            "checkpoint",
            "no expert weights found: this model has no sparse layers",
            "give a mixture-of-experts model",
        )
    counts = _expert_counts(family, tensors, config, {prefix for prefix, _ in found})
    stack = _fused_stack if family.fused else _stack
    return tuple(
        stack(family, prefix, matrix, found.get((prefix, matrix), {}), counts[prefix])
        for prefix in sorted(counts)
        for matrix in family.matrices
    )


def _pattern(family: Family, name: str) -> re.Pattern[str]:
    groups = {
        "prefix": rf"(?P<prefix>(?:.+\.)?{re.escape(family.prefix)})",
        "number": r"(?P<number>0|[1-9][0-9]{0,8})",
        "matrix": rf"(?P<matrix>{'|'.join(map(re.escape, family.matrices))})",
    }
    parts = re.split(r"\{(\w+)\}", name)
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [groups[part] for part in parts[1::2]]
    return re.compile("".join(parts))


def _expert_counts(
    family: Family,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    prefixes: Iterable[str],
) -> dict[str, int]:
    """Experts by layer's prefix: by the configuration, or else by the router, or else 0."""
    router = family.in_checkpoint(f".{family.router}")[1:]
    routers = {
        name.removesuffix(router) + family.prefix: info.shape[0]
        for name, info in tensors.items()
        if (name == router or name.endswith(f".{router}")) and info.shape
    }
    key = next((key for key in EXPERT_COUNTS if config.get(key) is not None), None)
    configured = config[key] if key else None
    if key and (type(configured) is not int or configured < 1):
        raise QMoEError(
            "checkpoint",
            f"config.json: {key!r} is {configured!r}, not a positive number",
            "correct config.json",
        )
    for prefix, routed in routers.items():
        if key and configured != routed:
            raise QMoEError(
                "checkpoint",
                f"config.json: {key} = {configured}, but the router beside {prefix!r} has "
                f"{routed} experts",
                "correct config.json",
            )
    return {prefix: configured or routers.get(prefix, 0) for prefix in {*prefixes, *routers}}


def _stack(
    family: Family, prefix: str, matrix: str, experts: Mapping[int, TensorInfo], expected: int
) -> ExpertStack:
    members = family.members(prefix, matrix)
    count = max(expected, len(experts), 1)
    for number in range(count):
        if number not in experts:
            raise QMoEError(
                "checkpoint",
                f"expert {number} of {count} is missing: there is no tensor "
                f"{members.replace('{}', str(number))!r}",
                _DOWNLOAD,
            )
    _check_count(members, len(experts), expected)
    first = experts[0]
    for number in range(count):
        info = experts[number]
        _check_expert(info, 2)
        if (info.shape, info.dtype) != (first.shape, first.dtype):
            raise QMoEError(
                "checkpoint",
                f"tensor {info.name!r}: {info.dtype} {list(info.shape)}, but {first.name!r} of the "
                f"same layer is {first.dtype} {list(first.shape)}",
                "give all experts of a layer the same shape and type",
            )
    rows, columns = first.shape
    name = family.stack_name(prefix, matrix)
    return ExpertStack(name, prefix, matrix, members, count, rows, columns, first.dtype)


def _fused_stack(
    family: Family, prefix: str, matrix: str, tensor: Mapping[int, TensorInfo], expected: int
) -> ExpertStack:
    name = family.stack_name(prefix, matrix)
    if not tensor:
        raise QMoEError(
            "checkpoint", f"experts are missing: there is no tensor {name!r}", _DOWNLOAD
        )
    info = tensor[0]
    _check_expert(info, 3)
    count, rows, columns = info.shape
    if family.transposed:
        rows, columns = columns, rows
    _check_count(name, count, expected or max(count, 1))
    return ExpertStack(
        name, prefix, matrix, "", count, rows, columns, info.dtype, family.transposed
    )


def _check_count(name: str, count: int, expected: int) -> None:
    if expected and count != expected:
        raise QMoEError(
            "checkpoint",
            f"{name!r}: there are {count} experts, but {expected} by config.json or the router",
            "correct config.json",
        )


def _check_expert(info: TensorInfo, dimensions: int) -> None:
    if len(info.shape) != dimensions:
        raise QMoEError(
            "checkpoint",
            f"tensor {info.name!r}: its shape is {list(info.shape)}, but experts of this family "
            f"have {dimensions} dimensions",
            "save the model with transformers",
        )
    if info.dtype not in EXPERT_DTYPES:
        raise QMoEError(
            "checkpoint",
            f"tensor {info.name!r}: is {info.dtype}, but experts have to be one of "
            f"{', '.join(EXPERT_DTYPES)}",
            "dequantize the checkpoint first",
        )
