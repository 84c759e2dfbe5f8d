"""A file and transformers' model: which stack is which layer's, and what the model lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qmoe_format import container
from qmoe_format.checkpoints.completeness import check_complete, dense_loads
from qmoe_format.checkpoints.expert_places import Places
from qmoe_format.checkpoints.expert_stacks import ExpertStack, LayerStacks, group
from qmoe_format.checkpoints.families import expert_layers
from qmoe_format.checkpoints.model import build, load_config
from qmoe_format.checkpoints.name_map import NameMap
from qmoe_format.checkpoints.native import PackedTensor, find_packed
from qmoe_format.checkpoints.tensor_info import TensorInfo
from qmoe_format.checkpoints.torch_dtypes import TORCH_DTYPES
from qmoe_format.container.attachment_files import attached_files
from qmoe_format.errors import QMoEError
from qmoe_format.export.compressed_folder import read_config


@contextmanager
def checked_config(
    file: container.QMoEFile, trust_remote_code: bool = False
) -> Iterator[tuple[Path, Any]]:
    """The folder of the attached files, and transformers' configuration, of a complete model.

    Args:
        trust_remote_code: whether code that came with the checkpoint may run.

    Raises:
        QMoEError: ``checkpoint`` if the file does not have every weight that transformers' model of
            its ``config.json`` needs; ``not-found`` without ``config.json``.
    """
    raw = read_config(file)
    with attached_files(file) as folder:
        try:
            config = load_config(folder, raw, trust_remote_code)
            model = build(config)
        except QMoEError as error:
            raise error.at(file.path) from error
        _check_weights(file, raw, NameMap(model))
        yield folder, config


def _check_weights(file: container.QMoEFile, raw: Mapping[str, Any], names: NameMap) -> None:
    layers = layers_of(file, names)
    shapes, packed = _dense(file, raw)
    dense = shapes | {name: each.shape for name, each in packed.items()}
    loads = dense_loads(file.path, names, dense)
    check_complete(file.path, raw, names, layers, dense, loads)


def layers_of(file: container.QMoEFile, names: NameMap) -> tuple[LayerStacks, ...]:
    """The expert layers of a file as the model of ``names`` has them.

    Raises:
        QMoEError: ``checkpoint`` if they do not belong together.
    """
    layers = list(expert_layers(names.model))
    places = Places(names, layers)
    found = []
    for name, entry in file.tensors.items():
        if entry.stack:
            place = places.find(entry.members.replace("{}", "0") or name)
            if place is None or len(entry.shape) != 3:
                raise QMoEError(
                    "checkpoint",
                    f"{file.path}: stack {name!r} is not one of the model's",
                    "convert the checkpoint again, or update transformers",
                )
            experts, rows, columns = entry.shape
            found.append(
                (place, ExpertStack(name, entry.members, experts, rows, columns, entry.dtype))
            )
    try:
        return group(found, layers)
    except QMoEError as error:
        raise error.at(file.path) from error


def dense_state(file: container.QMoEFile) -> dict[str, torch.Tensor]:
    """All tensors that are not experts, by their names in the checkpoint.

    Those that were kept in a quantized format are in bfloat16.

    Raises:
        QMoEError: the codes of reading.
    """
    shapes, packed = _dense(file, read_config(file))
    read = partial(_tensor, file)
    return {name: read(name) for name in shapes} | {
        name: each.decode(read).to(torch.bfloat16) for name, each in packed.items()
    }


def _dense(
    file: container.QMoEFile, raw: Mapping[str, Any]
) -> tuple[dict[str, tuple[int, ...]], dict[str, PackedTensor]]:
    """The shapes of plain tensors that are not experts, and the quantized ones."""
    stored = {
        name: TensorInfo(name, entry.dtype, entry.shape, 0)
        for name, entry in file.tensors.items()
        if not entry.stack
    }
    packed = find_packed(raw, stored)
    parts = {part for each in packed.values() for part in each.parts}
    return {name: info.shape for name, info in stored.items() if name not in parts}, packed


def _tensor(file: container.QMoEFile, name: str) -> torch.Tensor:
    array = file.read(name)
    if not array.flags.writeable:  # a view of the mapped file: writing to it would be fatal
        array = array.copy()
    return torch.from_numpy(array).view(TORCH_DTYPES[file.tensors[name].dtype])
