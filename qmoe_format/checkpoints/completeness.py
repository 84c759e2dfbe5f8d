"""Whether some tensors are all that transformers' model needs, and no layer more."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qmoe_format.checkpoints.expert_layers import check_shape
from qmoe_format.checkpoints.expert_stacks import LayerStacks
from qmoe_format.checkpoints.name_map import Load, NameMap
from qmoe_format.errors import QMoEError


def dense_loads(where: str, names: NameMap, shapes: Mapping[str, Sequence[int]]) -> dict[str, Load]:
    """How to make each parameter and buffer of the model that is made of some tensors.

    Args:
        where: the file or folder, for messages.
        shapes: of the tensors that are not experts, by their names in the checkpoint.

    Returns:
        By the model's names; weights that are tied have the same one.

    Raises:
        QMoEError: ``checkpoint`` if a tensor has another shape than the model's.
    """
    found: dict[str, Load] = {}
    for target, load in names.loads(shapes).items():
        if target not in names.shapes:
            continue
        for name, shape in names.made(load, shapes).items():
            if name in names.shapes:
                check_shape(where, load.names[0], shape, names.shapes[name])
                found[name] = load
    tied = names.model.all_tied_weights_keys.items()  # several may be tied to the same one
    for name, other in [*((source, target) for target, source in tied), *tied]:
        if name not in found and other in found:
            found[name] = found[other]
    return found


def check_complete(
    where: str,
    config: Mapping[str, Any],
    names: NameMap,
    layers: Sequence[LayerStacks],
    others: Iterable[str],
    loads: Mapping[str, Load],
) -> None:
    """Check that every weight that the model needs is there, and no block too many.

    Args:
        where: the file or folder, for messages.
        config: the contents of ``config.json``.
        names: the model's.
        layers: the experts that are there.
        others: the checkpoint's names of all other tensors.
        loads: of ``dense_loads``.

    Raises:
        QMoEError: ``checkpoint``.
    """
    model = names.model
    experts = {
        name
        for each in layers
        for matrix in (each.layer.inputs, each.layer.output)
        for name in each.layer.members(matrix)
    }
    optional = _pattern(model._keys_to_ignore_on_load_missing)
    missing = [
        name
        for name in names.shapes.keys() - experts - loads.keys()
        if not (optional and optional.search(name))
    ]
    if missing:
        raise missing_weights(where, missing, names, others)
    # Blocks that predict further tokens are not part of the model.
    settings = {**config, **(config.get("text_config") or {})}
    further = any(re.search("nextn|mtp", key) and value for key, value in settings.items())
    if not further:
        _check_blocks(where, names, layers, others)


def missing_weights(
    where: str, missing: Sequence[str], names: NameMap, others: Iterable[str]
) -> QMoEError:
    """The error that says which weights are missing, and which there are instead."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    unknown = [name for name in others if names.parameter(name)[0] not in names.shapes]
    there = f"; the model has no {unknown[0]!r}, which is there" if unknown else ""
    return QMoEError(
        "checkpoint",
        f"{where}: there are no weights for {min(missing)!r}{more}{there}",
        "download the whole checkpoint again, or save the model with transformers",
    )


def _check_blocks(
    where: str, names: NameMap, layers: Sequence[LayerStacks], others: Iterable[str]
) -> None:
    """Refuse blocks that config.json does not count."""
    expected = _pattern(names.model._keys_to_ignore_on_load_unexpected)
    blocks = {match[1] for name in names.shapes if (match := _BLOCK.match(name))}
    lists = {match[2] for each in layers if each.runs and (match := _BLOCK.match(each.path))}
    targets = ((name, names.parameter(name)[0]) for name in others)
    experts = ((each.stacks[0].name, each.path) for each in layers if not each.runs)
    for name, target in (*targets, *experts):
        block = _BLOCK.match(target)
        if not block or block[2] not in lists or block[1] in blocks:
            continue
        if not (expected and expected.search(target)):
            raise QMoEError(
                "checkpoint",
                f"{where}: tensor {name!r} is of a block that the model does not have by "
                "config.json",
                "download config.json again",
            )


_BLOCK = re.compile(r"((.+?)\.\d+)\.")  # of a name in the model, and the list that it is in


def _pattern(patterns: Iterable[str] | None) -> re.Pattern[str] | None:
    return re.compile("|".join(f"(?:{each})" for each in patterns)) if patterns else None
