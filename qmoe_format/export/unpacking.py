"""A ``.qmoe`` file back to a Hugging Face checkpoint that ``transformers`` loads.

Needs memory for one tensor or one expert, and no optional package.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format import container
from qmoe_format.atomic_file import sync_folder
from qmoe_format.container.attachment_files import placed
from qmoe_format.container.entries import TensorEntry
from qmoe_format.errors import QMoEError, os_errors
from qmoe_format.export import compressed_folder, safetensors_writer
from qmoe_format.export.compressed_folder import (
    CONFIG_FILE,
    DENSE_FILE,
    EXPERTS_FILE,
    read_float_config,
)
from qmoe_format.export.safetensors_writer import OutputTensor
from qmoe_format.machine import cores
from qmoe_format.progress import Counter, Progress
from qmoe_format.remote import RemotePath, location


def unpack(
    source: str | Path | RemotePath,
    folder: str | Path,
    *,
    shard_bytes: int = 5_000_000_000,
    compressed: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write all tensors, under their names in the checkpoint, and all attachments to a folder.

    Args:
        source: a ``.qmoe`` file, the index file of shards, or the URL of either.
        folder: a new or an empty one; it appears when it is complete.
        shard_bytes: most bytes of tensors in one safetensors file, unless ``compressed``.
        compressed: keep the experts as they are (``qmoe_format.export.compressed_folder``) instead
            of dequantizing them.
        progress: called with the bytes done and to do.

    Raises:
        QMoEError: the codes of ``open`` and of reading; ``argument`` if ``folder`` exists and is
            not empty, or if it would have compressed experts and other quantized weights;
            ``duplicate`` if two tensors or files would have one name; ``not-found`` if the folder
            above does not exist, or ``config.json`` is needed and not attached; ``checkpoint`` if
            it is needed and is not JSON; ``io``.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from qmoe_format.container import Writer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Writer(f"{folder}/model.qmoe") as writer:
        ...         writer.add_tensor("norm.weight", np.ones(4, np.float32), "F32")
        ...     unpacked = unpack(f"{folder}/model.qmoe", f"{folder}/model")
        ...     sorted(path.name for path in unpacked.iterdir())
        ['model-00001-of-00001.safetensors', 'model.safetensors.index.json']
    """
    if isinstance(location(folder), RemotePath):
        advice = "give a folder of this machine, and copy that"
        raise QMoEError("argument", f"{folder}: a folder can be written here only", advice)
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 -- also gives "folder/.." a name
    with os_errors(f"cannot write {folder}"):
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise QMoEError("argument", f"{folder}: exists already", "give a new or empty folder")
        if not folder.parent.is_dir():
            raise QMoEError("not-found", f"{folder.parent}: no such folder", "create it first")
    with os_errors(f"cannot write {folder}"), container.open(source, memory_map=False) as file:
        tensors = list(_tensors(file, compressed))
        total = sum(tensor.nbytes for tensor in tensors)
        changed = {}
        if compressed:
            changed[CONFIG_FILE] = compressed_folder.marked_config(read_float_config(file))
            total += sum(entry.stored_bytes for entry in file.tensors.values() if entry.stack)
        counter = Counter(progress, total)
        with _new_folder(folder) as unfinished:
            if compressed:
                compressed_folder.write_experts(file, unfinished / EXPERTS_FILE, counter)
                safetensors_writer.write_safetensors(unfinished / DENSE_FILE, tensors, counter)
            else:
                safetensors_writer.write_sharded(unfinished, tensors, shard_bytes, counter)
            for name in file.attachments:
                data = changed.get(name) or file.attachment(name)
                safetensors_writer.write_new(placed(unfinished, name), data)
    return folder


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill; it gets its name, durably, when the block ends without an error."""
    unfinished = folder.with_name(f".{folder.name[:200]}.{secrets.token_hex(4)}.partial")
    unfinished.mkdir()
    try:
        yield unfinished
        for path in (unfinished, *unfinished.iterdir()):
            if path.is_dir():
                sync_folder(path)
        unfinished.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _tensors(file: container.QMoEFile, compressed: bool) -> Iterator[OutputTensor]:
    """The checkpoint's tensors, without the experts if those stay compressed."""
    for name, entry in file.tensors.items():
        if not entry.stack:
            yield OutputTensor(name, entry.dtype, entry.shape, partial(_whole, file, name))
            continue
        if compressed:
            continue
        count, *shape = entry.shape
        if entry.transposed:  # [T-3]
            shape[-2:] = reversed(shape[-2:])
        if not entry.members:
            parts = partial(_experts, file, entry, range(count))
            yield OutputTensor(name, entry.dtype, (count, *shape), parts)
            continue
        for expert in range(count):
            member = entry.members.replace("{}", str(expert))
            parts = partial(_experts, file, entry, [expert])
            yield OutputTensor(member, entry.dtype, tuple(shape), parts)


def _whole(file: container.QMoEFile, name: str) -> Iterator[npt.NDArray[Any]]:
    yield file.read(name, cores())


def _experts(
    file: container.QMoEFile, entry: TensorEntry, experts: Iterable[int]
) -> Iterator[npt.NDArray[Any]]:
    for expert in experts:
        elements = file.read_expert(entry.name, expert, cores())
        yield np.ascontiguousarray(elements.mT) if entry.transposed else elements
