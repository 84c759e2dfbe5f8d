"""Which tensors of a checkpoint are experts, and how they group into stacks.

A model family's adapter is data: two patterns and a few names. ``find_stacks`` applies it and
refuses every checkpoint in which an expert is missing or would be left unquantised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qmoe_format.errors import QMoEError

EXPERT_DTYPES = ("BF16", "F16", "F32", "F64")
NUMBER = r"(?P<number>0|[1-9][0-9]{0,8})"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its shard describes it; ``dtype`` is a name of SPEC.md section 3.3."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """``experts`` matrices ``[rows, columns]`` that play one part in one layer.

    ``name`` is the stack's name in a ``.qmoe`` file. ``members`` has ``{}`` for the expert's number
    in the checkpoint's tensor names; it is empty if one tensor ``name`` of shape
    ``[experts, rows, columns]`` holds them all.
    """

    name: str
    members: str
    experts: int
    rows: int
    columns: int
    dtype: str

    def member(self, expert: int) -> str:
        """The checkpoint's name of the tensor that holds this expert."""
        return self.members.replace("{}", str(expert)) if self.members else self.name


@dataclass(frozen=True, slots=True)
class Adapter:
    """How one model family names its experts, each a two-dimensional tensor.

    Attributes:
        family: the name for people.
        model_types: of ``config.json``.
        expert: matches an expert's full name; its groups are ``head`` (up to ``experts``),
            ``number`` (write ``NUMBER``) and ``matrix``.
        members: that name again, a format of ``head`` and ``matrix``, ``{{}}`` for the number.
        matrices: the values of ``matrix``, each of which every sparse layer has.
        router: matches a layer's router, whose first dimension counts the experts; its group
            ``layer`` followed by ``experts`` is their head.
        expert_count: key of the number of experts in ``config.json``.
    """

    family: str
    model_types: tuple[str, ...]
    expert: re.Pattern[str]
    members: str
    matrices: tuple[str, ...]
    router: re.Pattern[str]
    expert_count: str


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
        if match := adapter.expert.fullmatch(name):
            key = (match["head"], match["matrix"])
            found.setdefault(key, {})[int(match["number"])] = info
        elif ".experts." in name:
            example = adapter.members.format(head="…experts", matrix=adapter.matrices[0])
            raise QMoEError(
                "checkpoint",
                f"tensor {name!r} looks like an expert's, but those of {adapter.family} are named "
                f"like {example.replace('{}', '0')!r}, and it would stay uncompressed; save the "
                "model with transformers, in a float type",
            )
    if not found:
        raise QMoEError(
            "checkpoint",
            f"no expert weights found: a {adapter.family} model without sparse layers has nothing "
            "to compress",
        )
    counts = _expected_counts(adapter, tensors, config, {head for head, _ in found})
    return tuple(
        _stack(adapter, head, matrix, found.get((head, matrix), {}), counts[head])
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
        match["layer"] + "experts": tensors[match.string].shape[0]
        for match in map(adapter.router.fullmatch, tensors)
        if match and tensors[match.string].shape
    }
    configured = config.get(adapter.expert_count)
    if configured is not None and (type(configured) is not int or configured < 1):
        raise QMoEError(
            "checkpoint",
            f"config.json: {adapter.expert_count!r} is {configured!r}, not a positive number",
        )
    for head, routed in routers.items():
        if configured is not None and configured != routed:
            raise QMoEError(
                "checkpoint",
                f"config.json has {adapter.expert_count} = {configured}, but the router beside "
                f"{head!r} is for {routed} experts; they have to agree",
            )
    return {head: configured or routers.get(head, 0) for head in {*heads, *routers}}


def _stack(
    adapter: Adapter, head: str, matrix: str, experts: Mapping[int, TensorInfo], expected: int
) -> ExpertStack:
    members = adapter.members.format(head=head, matrix=matrix)
    count = max(expected, len(experts), 1)
    for number in range(count):
        if number not in experts:
            raise QMoEError(
                "checkpoint",
                f"expert {number} of {count} is missing: there is no tensor "
                f"{members.replace('{}', str(number))!r}; fetch the whole checkpoint again",
            )
    if len(experts) != expected and expected:
        raise QMoEError(
            "checkpoint",
            f"{members!r}: there are {len(experts)} experts, but {adapter.expert_count} in "
            f"config.json, or the router, says {expected}",
        )
    first = experts[0]
    for number in range(count):
        info = experts[number]
        if len(info.shape) != 2:
            raise QMoEError(
                "checkpoint", f"tensor {info.name!r} has shape {list(info.shape)}, not a matrix's"
            )
        if info.dtype not in EXPERT_DTYPES:
            raise QMoEError(
                "checkpoint",
                f"tensor {info.name!r} is {info.dtype}, but experts have to be one of "
                f"{', '.join(EXPERT_DTYPES)}; dequantise the checkpoint first",
            )
        if (info.shape, info.dtype) != (first.shape, first.dtype):
            raise QMoEError(
                "checkpoint",
                f"tensor {info.name!r} is {info.dtype} {list(info.shape)}, but {first.name!r} of "
                f"the same layer is {first.dtype} {list(first.shape)}; experts of a layer have to "
                "be alike",
            )
    rows, columns = first.shape
    return ExpertStack(f"{head}.{matrix}", members, count, rows, columns, first.dtype)
