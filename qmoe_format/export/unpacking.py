"""A ``.qmoe`` file back to a Hugging Face checkpoint that ``transformers`` loads.

Needs memory for one tensor or one expert, and no optional package.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qmoe_format import container
from qmoe_format.atomic_file import sync_folder
from qmoe_format.checkpoints import adapter_for
from qmoe_format.errors import QMoEError, os_errors
from qmoe_format.export.compressed_folder import (
    CONFIG,
    DENSE,
    EXPERTS,
    marked,
    read_config,
    write_experts,
)
from qmoe_format.export.safetensors_writer import (
    OutputTensor,
    write_new,
    write_safetensors,
    write_sharded,
)
from qmoe_format.machine import cores

if TYPE_CHECKING:
    from qmoe_format.container import QMoEFile, ShardedFile
    from qmoe_format.container.reader import Progress

DEFAULT_SHARD_BYTES = 5_000_000_000


def unpack(
    source: str | Path,
    folder: str | Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    compressed: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write every tensor under its name in the checkpoint, and the attachments.

    Experts are dequantised, or stay as they are if ``compressed``: such a folder is described in
    ``qmoe_format.export.compressed_folder``. The folder appears when it is whole.

    Args:
        source: a ``.qmoe`` file, or the index file of shards.
        folder: where to; it must not be there, or be empty.
        shard_bytes: the most bytes of tensors in one safetensors file, unless ``compressed``.
        compressed: leave the experts compressed.
        progress: called with the bytes done and to do.

    Raises:
        QMoEError: the codes of ``open`` and of reading; ``argument`` if ``folder`` is there;
            ``duplicate`` if two tensors or files would have one name.
            ``not-found`` if there is no folder above, or ``config.json`` is needed and not
            attached; ``checkpoint`` if it is needed and is not JSON; ``io``.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 -- "folder/.." has a name, too
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise QMoEError("argument", f"{folder}: is there already; give a new or an empty folder")
    if not folder.parent.is_dir():
        raise QMoEError("not-found", f"{folder.parent}: no such folder; make it first")
    with (
        os_errors(f"cannot write {folder}"),
        container.open(source, memory_map=False) as file,
    ):
        tensors = list(_tensors(file, stacks=not compressed))
        total = sum(tensor.nbytes for tensor in tensors)
        changed = {}
        if compressed:
            changed[CONFIG] = json.dumps(marked(read_config(file)), indent=2).encode() + b"\n"
            total += sum(entry.stored_bytes for entry in file.tensors.values() if entry.stack)
        done = 0

        def report(size: int) -> None:
            nonlocal done
            done += size
            if progress:
                progress(done, total)

        def written(tensor: OutputTensor) -> None:
            report(tensor.nbytes)

        unfinished = folder.with_name(f".{folder.name[:200]}.{secrets.token_hex(4)}.partial")
        unfinished.mkdir()
        try:
            if compressed:
                write_experts(file, unfinished / EXPERTS, report)
                write_safetensors(unfinished / DENSE, tensors, written)
            else:
                write_sharded(unfinished, tensors, shard_bytes, written)
            for name in file.attachments:
                write_new(unfinished / name, changed.get(name) or file.attachment(name))
            sync_folder(unfinished)
            unfinished.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return folder


def _tensors(file: QMoEFile | ShardedFile, stacks: bool) -> Iterator[OutputTensor]:
    """The checkpoint's tensors: an expert stack that was many tensors becomes many again."""
    threads = cores()
    fused = any(entry.stack and not entry.members for entry in file.tensors.values())
    transposed = stacks and fused and _transposed(file)

    def whole(name: str) -> Iterator[npt.NDArray[Any]]:
        yield file.read(name, threads)

    def experts(name: str, numbers: Iterable[int]) -> Iterator[npt.NDArray[Any]]:
        return (file.read_expert(name, expert, threads) for expert in numbers)

    def turned(name: str, numbers: Iterable[int]) -> Iterator[npt.NDArray[Any]]:
        return (np.ascontiguousarray(matrix.T) for matrix in experts(name, numbers))

    for name, entry in file.tensors.items():
        dtype, shape = entry.dtype, entry.shape
        if not entry.stack:
            yield OutputTensor(name, dtype, shape, partial(whole, name))
        elif not stacks:
            continue
        elif not entry.members and transposed:
            turned_shape = (shape[0], shape[2], shape[1])
            yield OutputTensor(name, dtype, turned_shape, partial(turned, name, range(shape[0])))
        elif not entry.members:
            yield OutputTensor(name, dtype, shape, partial(experts, name, range(shape[0])))
        else:
            for expert in range(shape[0]):
                member = entry.members.replace("{}", str(expert))
                yield OutputTensor(member, dtype, shape[1:], partial(experts, name, [expert]))


def _transposed(file: QMoEFile | ShardedFile) -> bool:
    """Whether the checkpoint's own tensors of many experts are ``[experts, in, out]``.

    Not without ``config.json`` or for a family that is not known: such a file is no conversion's.
    """
    if CONFIG not in file.attachments:
        return False
    config = read_config(file)
    try:
        return adapter_for(config).transposed
    except QMoEError:
        return False
