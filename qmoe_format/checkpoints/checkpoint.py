"""A Hugging Face checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import torch

from qmoe_format.checkpoints import model as models
from qmoe_format.checkpoints.attachments import copy_attachments, find_attachments
from qmoe_format.checkpoints.completeness import check_complete, dense_loads, missing_weights
from qmoe_format.checkpoints.expert_stacks import ExpertStack, find_layers
from qmoe_format.checkpoints.families import expert_layers
from qmoe_format.checkpoints.name_map import Load, NameMap
from qmoe_format.checkpoints.native import find_packed
from qmoe_format.checkpoints.tensor_info import TensorInfo
from qmoe_format.checkpoints.torch_dtypes import DTYPE_NAMES
from qmoe_format.checkpoints.weight_files import Shard, open_shard
from qmoe_format.container.limits import DIMENSIONS
from qmoe_format.errors import QMoEError
from qmoe_format.hub.checkpoints import WEIGHT_FILES
from qmoe_format.remote import Location, RemotePath, location

if TYPE_CHECKING:
    from torch import Tensor

_OTHER_FILES = (
    "give the folder with config.json and the weights, as safetensors or .bin; GGUF files cannot "
    "be converted, but what they were made from can"
)
_DOWNLOAD = "download the checkpoint again"


class Checkpoint:
    """A checkpoint's tensors, expert stacks and small files; a context manager.

    Weights that are stored in a quantized format are read as what they stand for.

    Attributes:
        folder: where it is or, if that is elsewhere, copies of its small files.
        where: what to call it in a message.
        config: the contents of ``config.json``.
        tensors: every tensor by name, in order of names; quantized ones as BF16.
        packed: the quantized ones among them.
        stored: every tensor as it lies in the weight files.
        model_config: transformers' configuration, without quantization.
        model: transformers' model without weights.
        names: how ``tensors`` map to its parameters.
        layers: the layers with experts.
        stacks: the stacks of all layers.
        attachments: configuration and tokenizer files, in order of names.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        shards: Sequence[Shard],
        stored: Mapping[str, TensorInfo],
        *,
        trust_remote_code: bool = False,
        release_after: int = 1 << 27,
        where: str | None = None,
        copies: TemporaryDirectory[str] | None = None,
    ) -> None:
        """Of ``shards`` whose memory maps are dropped when ``release_after`` bytes were read.

        On leaving the context ``copies``, if that is what ``folder`` is, is removed.

        Raises:
            QMoEError: ``checkpoint`` if transformers does not know the model, if the experts are
                incomplete, or an attachment does not fit.
        """
        self.folder = folder
        self.where = where or str(folder)
        self._copies = copies
        self.config = config
        self.stored = stored
        self.packed = find_packed(config, stored)
        parts = {part for packed in self.packed.values() for part in packed.parts}
        tensors = {name: info for name, info in stored.items() if name not in parts} | {
            name: TensorInfo(name, "BF16", packed.shape, -1) for name, packed in self.packed.items()
        }
        self.tensors: Mapping[str, TensorInfo] = dict(sorted(tensors.items()))
        self.model_config = models.load_config(folder, config, trust_remote_code)
        self.model = models.build(self.model_config)
        self.names = NameMap(self.model)
        self.layers = find_layers(
            self.names,
            list(expert_layers(self.model)),
            self.tensors,
            DTYPE_NAMES.get(self.model_config.dtype, "BF16"),
        )
        self.stacks = tuple(stack for layer in self.layers for stack in layer.stacks)
        self.attachments = find_attachments(folder, code=trust_remote_code)
        self._shards = shards
        self._release_after = release_after
        self._mapped_bytes = 0

    @cached_property
    def others(self) -> list[str]:
        """Names of the tensors that are not experts, in order."""
        experts = {stack.member(e) for stack in self.stacks for e in range(stack.experts)}
        return [name for name in self.tensors if name not in experts]

    @property
    def weight_files(self) -> list[Location]:
        """The files of weights."""
        return [shard.path for shard in self._shards]

    def stored_bytes(self, names: Iterable[str]) -> int:
        """How many bytes some of ``tensors`` take in the weight files."""
        parts = (
            part
            for name in names
            for part in (self.packed[name].parts if name in self.packed else (name,))
        )
        return sum(self.stored[part].bytes for part in parts)

    def read(self, name: str) -> Tensor:
        """A tensor by name, on the CPU; often a view of a memory map, so do not keep it."""
        if name in self.packed:
            return self.packed[name].decode(self.read_stored).to(torch.bfloat16)
        return self.read_stored(name)

    def read_stored(self, name: str) -> Tensor:
        """A tensor of the weight files, likewise."""
        info = self.stored[name]
        return self._shard_to_read(info, info.bytes).read(name)

    def _read_row(self, name: str, index: int, count: int) -> Tensor:
        """Row ``index`` of one that has ``count``; all of another one."""
        info = self.stored[name]
        if info.shape[:1] != (count,):
            return self.read_stored(name)
        return self._shard_to_read(info, info.bytes // count).read_row(name, index)

    def _shard_to_read(self, info: TensorInfo, size: int) -> Shard:
        if self._mapped_bytes > self._release_after:
            self.close()
        self._mapped_bytes += size
        return self._shards[info.shard]

    def read_expert(self, stack: ExpertStack, expert: int) -> Tensor:
        """One expert's matrix [rows, columns], like ``read``; a quantized one exactly, in float32.

        Raises:
            QMoEError: ``checkpoint`` if it is quantized in a way that its format does not allow.
        """
        name = stack.member(expert)
        packed = self.packed.get(name)
        if stack.members:
            matrix = packed.decode(self.read_stored) if packed else self.read_stored(name)
        elif packed:
            matrix = packed.decode_expert(self._read_row, expert)
        else:
            matrix = self._read_row(name, expert, stack.experts)
        return matrix.T if stack.transposed else matrix

    @cached_property
    def loads(self) -> Mapping[str, Load]:
        """How to make each parameter of the model that is not experts' matrices, by its name.

        Raises:
            QMoEError: ``checkpoint`` if a tensor has another shape than the model's.
        """
        shapes = {name: self.tensors[name].shape for name in self.others}
        return dense_loads(self.where, self.names, shapes)

    def parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and buffers of the model by their names in it.

        Raises:
            QMoEError: ``checkpoint`` if one is missing.
        """
        wanted = list(names)
        made: dict[str, Tensor] = {}
        for name in wanted:
            load = self.loads.get(name)
            if load is None:
                raise missing_weights(self.where, [name], self.names, self.others)
            if name not in made:
                found = load.run(self.model, self.read)
                # A tied weight has the other's name.
                made |= found if name in found else {name: next(iter(found.values()))}
        return {name: made[name] for name in wanted}

    def check_complete(self) -> None:
        """Check that every weight that the model needs is there, and no block too many.

        Raises:
            QMoEError: ``checkpoint``.
        """
        check_complete(self.where, self.config, self.names, self.layers, self.others, self.loads)

    def close(self) -> None:
        """Drop the memory maps; the next ``read`` makes them again."""
        for shard in self._shards:
            shard.release()
        self._mapped_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        if self._copies:
            self._copies.cleanup()


def open_checkpoint(
    folder: str | Path | RemotePath, *, trust_remote_code: bool = False
) -> Checkpoint:
    """Open a checkpoint folder; reads its configuration and the headers of its weight files.

    Args:
        folder: its path or URL. What has a URL stays there, but for small files, which are copied
            into a temporary folder; a tensor, or an expert's part of it, is read by one request.
        trust_remote_code: whether code that the checkpoint brings may run.

    Raises:
        QMoEError: ``not-found`` if there is no such folder; ``checkpoint`` if it is incomplete,
            unreadable or of a type that transformers does not know; for a URL also ``dependency``,
            ``argument`` and ``io``.
    """
    folder = location(folder)
    if folder.is_file():
        raise QMoEError("argument", f"{folder}: is a file, not a folder", _OTHER_FILES)
    if not folder.is_dir():
        raise QMoEError(
            "not-found", f"{folder}: no such folder", "give one with config.json and the weights"
        )
    config = _read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "qmoe":
        raise QMoEError(
            "checkpoint",
            f"{folder}: its experts are compressed already",
            f"use the .qmoe file in it, {quantization.get('file')}, or convert the original",
        )
    paths, listed = _weight_files(folder)
    shards = [open_shard(path) for path in paths]
    tensors: dict[str, TensorInfo] = {}
    for number, shard in enumerate(shards):
        for name, dtype, shape in shard.tensors():
            if len(shape) > DIMENSIONS:
                raise QMoEError(
                    "checkpoint",
                    f"{shard.path}: tensor {name!r} has {len(shape)} dimensions, more than the "
                    f"{DIMENSIONS} that the format can hold",
                    "remove or reshape it",
                )
            # Of a tensor in two files, transformers takes the one that the index names.
            if name in tensors and listed.get(name, shard.path.name) != shard.path.name:
                continue
            tensors[name] = TensorInfo(name, dtype, shape, number)
        shard.release()
    for name, file in listed.items():
        if name not in tensors or paths[tensors[name].shard].name != file:
            raise QMoEError(
                "checkpoint", f"{folder / file}: lacks tensor {name!r} of the index", _DOWNLOAD
            )
    opened = partial(
        Checkpoint,
        config=config,
        shards=shards,
        stored=dict(sorted(tensors.items())),
        trust_remote_code=trust_remote_code,
    )
    if isinstance(folder, Path):
        return opened(folder)
    copies = TemporaryDirectory(prefix="qmoe-")
    try:
        copy_attachments(folder, Path(copies.name), code=trust_remote_code)
        return opened(Path(copies.name), where=str(folder), copies=copies)
    except BaseException:
        copies.cleanup()
        raise


def _weight_files(folder: Location) -> tuple[list[Location], dict[str, str]]:
    """Paths of the weight files, and the file of each tensor if there is an index."""
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise QMoEError(
            "checkpoint",
            f"{folder}: no weights",
            f"give a folder with one of {', '.join(WEIGHT_FILES)}",
        )
    if found.suffix != ".json":
        return [found], {}
    listed = _read_json(found).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise QMoEError("checkpoint", f"{found}: no 'weight_map' of tensors to files", _DOWNLOAD)
    suffix = PurePath(found.name.removesuffix(".index.json")).suffix
    for file in listed.values():
        if not isinstance(file, str) or PurePath(file).name != file or not file.endswith(suffix):
            raise QMoEError(
                "checkpoint", f"{found}: {file!r} is not the name of a {suffix} file", _DOWNLOAD
            )
    return [folder / file for file in sorted(set(listed.values()))], listed


def _read_json(path: Location) -> dict[str, Any]:
    if not path.is_file():  # reading a pipe or a device might not end
        problem = "not a file" if path.exists() else "missing"
        raise QMoEError(
            "checkpoint", f"{path}: {problem}", "give the folder of a Hugging Face checkpoint"
        )
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise QMoEError("checkpoint", f"{path}: not JSON ({error})", _DOWNLOAD) from error
    if not isinstance(value, dict):
        raise QMoEError("checkpoint", f"{path}: not a JSON object", _DOWNLOAD)
    return value
