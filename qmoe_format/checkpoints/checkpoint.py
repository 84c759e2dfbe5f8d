"""A Hugging Face checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qmoe_format.checkpoints.expert_stacks import ExpertStack, TensorInfo, find_stacks
from qmoe_format.checkpoints.families import family_for
from qmoe_format.checkpoints.layers import check_layers
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from types import EllipsisType

    from torch import Tensor

    from qmoe_format.checkpoints.weight_files import Shard

# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ATTACHED_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
MAX_ATTACHMENT_BYTES = 1 << 28
_DOWNLOAD = "download the checkpoint again"


class Checkpoint:
    """A checkpoint's tensors, expert stacks and small files; a context manager.

    Attributes:
        folder: where it is.
        config: the contents of ``config.json``.
        tensors: every tensor by name, in order of names.
        stacks: the expert stacks.
        attachments: configuration and tokenizer files, in order of names.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        shards: Sequence[Shard],
        tensors: Mapping[str, TensorInfo],
        release_after: int = 1 << 27,
    ) -> None:
        """Of ``shards`` whose memory maps are dropped when ``release_after`` bytes were read.

        Raises:
            QMoEError: ``checkpoint`` if the experts are incomplete, or an attachment does not fit.
        """
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self.stacks = find_stacks(family_for(config), tensors, config)
        self.attachments = _attachments(folder)
        self._shards = shards
        self._release_after = release_after
        self._mapped_bytes = 0

    @property
    def others(self) -> list[str]:
        """Names of the tensors that are not experts, in order."""
        experts = {stack.member(e) for stack in self.stacks for e in range(stack.experts)}
        return [name for name in self.tensors if name not in experts]

    @property
    def weight_files(self) -> list[Path]:
        """The files of weights."""
        return [shard.path for shard in self._shards]

    def read(self, name: str) -> Tensor:
        """A tensor by name, on the CPU; often a view of a memory map, so do not keep it."""
        return self._read(name, ...)

    def read_expert(self, stack: ExpertStack, expert: int) -> Tensor:
        """One expert's matrix [rows, columns], like ``read``."""
        if stack.members:
            return self.read(stack.member(expert))
        matrix = self._read(stack.name, expert)
        return matrix.T if stack.transposed else matrix

    def _read(self, name: str, part: int | EllipsisType) -> Tensor:
        if self._mapped_bytes > self._release_after:
            self.close()
        tensor = self._shards[self.tensors[name].shard].read(name)[part]
        self._mapped_bytes += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Drop the memory maps; the next ``read`` makes them again."""
        for shard in self._shards:
            shard.release()
        self._mapped_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint folder; reads its configuration and the headers of its weight files.

    Raises:
        QMoEError: ``not-found`` if there is no such folder; ``checkpoint`` if it is incomplete,
            unreadable or of an unknown family.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise QMoEError(
            "not-found", f"{folder}: no such folder", "give one with config.json and the weights"
        )
    from qmoe_format.checkpoints.weight_files import open_shard

    config = _read_json(folder / "config.json")
    family_for(config)
    _check_not_quantized(config)
    paths, listed = _weight_files(folder)
    shards = [open_shard(path) for path in paths]
    tensors: dict[str, TensorInfo] = {}
    for number, shard in enumerate(shards):
        for name, dtype, shape in shard.tensors():
            if name in tensors:
                raise QMoEError(
                    "checkpoint",
                    f"{shard.path}: tensor {name!r} is also in {paths[tensors[name].shard].name}",
                    "remove one of the two files and correct the index",
                )
            tensors[name] = TensorInfo(name, dtype, shape, number)
        shard.release()
    for name, file in listed.items():
        if name not in tensors or paths[tensors[name].shard].name != file:
            raise QMoEError(
                "checkpoint", f"{folder / file}: lacks tensor {name!r} of the index", _DOWNLOAD
            )
    check_layers(config, tensors)
    return Checkpoint(folder, config, shards, dict(sorted(tensors.items())))


def _check_not_quantized(config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    raise QMoEError(
        "checkpoint",
        f"config.json: the weights are already quantized ({method})",
        "convert the model in a float type. To make one: load this one with transformers and "
        "dequantize=True in its quantization_config, put its state dict into a new model of its "
        "config, and save that (otherwise the experts keep the names of quantized ones)",
    )


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
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
    suffix = Path(found.name.removesuffix(".index.json")).suffix
    for file in listed.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(suffix):
            raise QMoEError(
                "checkpoint", f"{found}: {file!r} is not the name of a {suffix} file", _DOWNLOAD
            )
    return [folder / file for file in sorted(set(listed.values()))], listed


def _attachments(folder: Path) -> list[Path]:
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in ATTACHED_SUFFIXES
        and not path.name.endswith(".index.json")
        # Reports of earlier conversions (``conversion.report``) that were written here.
        and not f".{path.name}".endswith(".quality.json")
        and not path.name.startswith(".")
        and path.is_file()
    ]
    from qmoe_format.container.index import check_file_name  # here: `qmoe --help` does without

    for path in paths:
        try:
            check_file_name(path.name)
        except QMoEError as error:
            raise QMoEError(
                "checkpoint",
                f"{path}: the name of an attached file has characters other than A-Z a-z 0-9 . _ -",
                "rename or move it",
            ) from error
        if path.stat().st_size > MAX_ATTACHMENT_BYTES:
            raise QMoEError(
                "checkpoint",
                f"{path}: {path.stat().st_size:,} bytes are too many for a configuration or "
                "tokenizer file",
                "move it elsewhere",
            )
    return paths


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise QMoEError(
            "checkpoint", f"{path}: missing", "give the folder of a Hugging Face checkpoint"
        ) from error
    except (ValueError, RecursionError) as error:
        raise QMoEError("checkpoint", f"{path}: not JSON ({error})", _DOWNLOAD) from error
    if not isinstance(value, dict):
        raise QMoEError("checkpoint", f"{path}: not a JSON object", _DOWNLOAD)
    return value
