"""Load models for ``generate``, ``chat`` and ``eval``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from qmoe_format.errors import QMoEError
from qmoe_format.machine import require
from qmoe_format.remote import Location


def require_transformers() -> None:
    """Import transformers and silence everything but its errors.

    Raises:
        QMoEError: ``dependency`` if it, torch or safetensors is missing.
    """
    require("torch", "safetensors", "transformers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The tokenizer and the compressed model of ``options.file``, or its part for text."""
    require_transformers()
    import torch

    from qmoe_format.runtime import load_model, load_tokenizer

    # Many CPUs compute with bfloat16 in software. None: the dtype that the file says.
    name = options.dtype or ("float32" if options.device == "cpu" else None)
    dtype = getattr(torch, name) if name else None
    trusted = options.trust_remote_code
    tokenizer = load_tokenizer(options.file, trust_remote_code=trusted)
    model = load_model(
        options.file,
        device=options.device,
        dtype=dtype,
        trust_remote_code=trusted,
        expert_memory=options.expert_memory,
        exact=options.exact,
    )
    return tokenizer, text_part(model)


def text_part(model: Any) -> Any:
    """What reads and writes text in a model; of all but Qwen3-Omni, which also speaks, all."""
    return getattr(model, "thinker", model)


def check_original(folder: Location, path: Location, trust_remote_code: bool) -> None:
    """Check that a checkpoint has the experts of a ``.qmoe`` file.

    Raises:
        QMoEError: ``argument`` if it does not; otherwise those of opening either.
    """
    advice = "give the original checkpoint"
    if not folder.is_dir():
        raise QMoEError("not-found", f"{folder}: no such folder", advice)
    from qmoe_format import container
    from qmoe_format.checkpoints import open_checkpoint

    with (
        container.open(path) as file,
        open_checkpoint(folder, trust_remote_code=trust_remote_code) as checkpoint,
    ):
        ours = {name: tuple(entry.shape) for name, entry in file.tensors.items() if entry.stack}
        theirs = {
            stack.name: (stack.experts, stack.rows, stack.columns) for stack in checkpoint.stacks
        }
    if ours != theirs:
        name = min(ours.keys() ^ theirs.keys() or {n for n in ours if ours[n] != theirs[n]})
        raise QMoEError(
            "argument",
            f"{folder}: {path} was not made from this checkpoint: {name!r} is not in both, or has "
            "another shape",
            advice,
        )
