"""Models for ``generate`` and ``eval``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import qmoe_format
from qmoe_format.errors import QMoEError
from qmoe_format.machine import require


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The tokenizer and the compressed model of ``options.file``."""
    quiet()
    from qmoe_format.runtime import load_model, load_tokenizer

    tokenizer = load_tokenizer(options.file)
    return tokenizer, load_model(options.file, device=options.device, dtype=dtype(options))


def check_original(folder: Path, path: Path) -> None:
    """That a checkpoint has the experts of a ``.qmoe`` file; raises ``QMoEError``."""
    if not folder.is_dir():
        raise QMoEError("not-found", f"{folder}: no such folder; give the original checkpoint")
    require("torch", "safetensors")
    from qmoe_format.checkpoints import open_checkpoint

    with qmoe_format.open(path) as file, open_checkpoint(folder) as checkpoint:
        ours = {name: tuple(entry.shape) for name, entry in file.tensors.items() if entry.stack}
        theirs = {
            stack.name: (stack.experts, stack.rows, stack.columns) for stack in checkpoint.stacks
        }
    if ours != theirs:
        name = min(ours.keys() ^ theirs.keys() or {n for n in ours if ours[n] != theirs[n]})
        raise QMoEError(
            "argument",
            f"{folder}: is not what {path} was made from: {name!r} is not in both, or of another "
            "shape; give the original checkpoint",
        )


def load_original(folder: Path, model: Any) -> Any:
    """The model of a checkpoint, in the numbers and on the device of another model."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    try:
        original = kind.from_pretrained(folder, dtype=model.dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise QMoEError(
            "checkpoint",
            f"{folder}: transformers cannot load it ({error}); fetch the original checkpoint "
            "again, or update transformers",
        ) from error
    return original.to(model.device).eval()


def dtype(options: argparse.Namespace) -> Any:
    """The torch dtype that was asked for; None: that of the file."""
    import torch

    # Many CPUs compute with bfloat16 in software.
    name = options.dtype or ("float32" if options.device == "cpu" else None)
    return name and getattr(torch, name)


def quiet() -> None:
    """Let transformers say nothing beside a model's text but what goes wrong.

    Raises ``QMoEError``: ``dependency`` without it.
    """
    require("torch", "safetensors", "transformers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
