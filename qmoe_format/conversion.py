"""A Hugging Face checkpoint to a ``.qmoe`` file, in bounded memory."""

from __future__ import annotations

import glob
import importlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_format.codec import PROFILES, EncodedMatrix, Profile, encode_matrix
from qmoe_format.errors import QMoEError
from qmoe_format.located import os_errors
from qmoe_format.machine import cores
from qmoe_format.writer import Writer

if TYPE_CHECKING:
    from torch import Tensor

    from qmoe_format.checkpoints import Checkpoint, ExpertStack
    from qmoe_format.quantize import Recipe

# Experts at least this large are coded one at a time, by all threads; smaller ones side by side.
LARGE_EXPERT = 1 << 24

Progress = Callable[[int, int], None]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    recipe: str = "rtn",
    profile: str = "fast",
    shard_bytes: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert a checkpoint directory. The same input and settings give the same bytes.

    Memory stays below 1 GiB plus twice the largest tensor. Nothing appears at ``destination``
    before it is whole, and what was there stays until then.

    Args:
        source: a folder with ``config.json``, weights, and tokenizer files.
        destination: the file to write.
        recipe: the quantizer's name, see ``qmoe_format.quantize.RECIPES``.
        profile: ``fast`` (decoding speed) or ``size``.
        shard_bytes: begin another file after so many bytes; by default there is one.
        threads: how many to use; by default one a core. The bytes do not depend on it.
        overwrite: replace what is at ``destination``; otherwise that is an error.
        progress: called with the weights done and to do.

    Returns:
        ``destination``: the file to open. With ``shard_bytes`` it may be the small file that names
        the shards, which lie beside it.

    Raises:
        QMoEError: ``dependency``, ``argument``, ``not-found``, ``checkpoint``, ``value`` (weights
            that are NaN or infinite), or ``io``, for example because the disk is full.
    """
    require("torch", "safetensors")
    from qmoe_format.checkpoints import open_checkpoint
    from qmoe_format.quantize import recipe as find_recipe

    destination = Path(destination)
    chosen = find_recipe(recipe)
    if profile not in PROFILES:
        raise QMoEError("argument", f"profile {profile!r} is not one of {', '.join(PROFILES)}")
    threads = threads or cores()
    check_destination(destination, overwrite, shard_bytes is not None)
    with (
        os_errors(f"cannot read {source}"),
        open_checkpoint(source) as checkpoint,
        Writer(destination, shard_bytes=shard_bytes) as writer,
    ):
        _convert(checkpoint, writer, chosen, PROFILES[profile], threads, progress)
    return destination


def require(*modules: str) -> None:
    """Import optional packages; ``dependency`` if one is missing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise QMoEError(
                "dependency",
                f"the package {module} cannot be imported ({error}); "
                "run: pip install 'qmoe-format[convert]'",
            ) from error


def check_destination(path: Path, overwrite: bool, sharded: bool) -> None:
    """Refuse a destination that cannot be written, or that is there already, itself or a shard."""
    if path.is_dir():
        raise QMoEError("argument", f"{path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise QMoEError("not-found", f"{path.parent}: no such folder; make it first")
    there = [path] if path.exists() else []
    if sharded:
        stem = path.name.removesuffix(".json").removesuffix(".qmoe")
        there += sorted(path.parent.glob(f"{glob.escape(stem)}-?????-of-?????.qmoe"))
    if there and not overwrite:
        raise QMoEError("argument", f"{there[0]}: is there already; remove it, or use --force")


def _convert(
    checkpoint: Checkpoint,
    writer: Writer,
    recipe: Recipe,
    profile: Profile,
    threads: int,
    progress: Progress | None,
) -> None:
    from qmoe_format.checkpoints.elements import to_storage

    total = sum(info.elements for info in checkpoint.tensors.values())
    done = 0

    def advance(elements: int) -> None:
        nonlocal done
        done += elements
        if progress:
            progress(done, total)

    for path in checkpoint.attachments:
        writer.add_attachment(path.name, path.read_bytes())
    for name in checkpoint.others:
        tensor = checkpoint.read(name)
        writer.add_tensor(name, to_storage(tensor), checkpoint.tensors[name].dtype)
        advance(tensor.numel())
    for stack in checkpoint.stacks:
        with writer.add_stack(
            stack.name,
            (stack.experts, stack.rows, stack.columns),
            stack.dtype,
            "ternary-dict",
            stack.members,
        ) as experts:
            for matrix in _encoded(checkpoint, stack, recipe, profile, threads):
                experts.append(matrix)
                advance(stack.rows * stack.columns)


def _encoded(
    checkpoint: Checkpoint, stack: ExpertStack, recipe: Recipe, profile: Profile, threads: int
) -> Iterator[EncodedMatrix]:
    """The experts of a stack in order; few are in memory at a time."""
    from qmoe_format.checkpoints.elements import to_storage

    within = threads if stack.rows * stack.columns >= LARGE_EXPERT else 1
    workers = 1 if within > 1 else threads
    scale_dtype = recipe.scale_dtype(stack.dtype)

    def encode(weights: Tensor) -> EncodedMatrix:
        ternary = recipe.quantize(weights[None], scale_dtype)
        return encode_matrix(
            ternary.trits[0].numpy(),
            to_storage(ternary.scales[0]),
            scale_dtype=scale_dtype,
            width=profile.width,
            rows_per_segment=profile.rows_per_segment(stack.columns),
            threads=within,
        )

    def result(expert: int, future: Future[EncodedMatrix]) -> EncodedMatrix:
        try:
            return future.result()
        except QMoEError as error:
            raise QMoEError(error.code, f"tensor {stack.member(expert)!r}: {error}") from error

    with _one_torch_thread(), ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[int, Future[EncodedMatrix]]] = deque()
        try:
            for expert in range(stack.experts):
                weights = checkpoint.read_expert(stack, expert)
                waiting.append((expert, pool.submit(encode, weights)))
                del weights
                if len(waiting) > (workers if workers > 1 else 0):
                    yield result(*waiting.popleft())
            while waiting:
                yield result(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Threads of torch's own wait for each other at every step, for long on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
