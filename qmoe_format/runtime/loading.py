"""A model and its tokenizer from one ``.qmoe`` file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers

from qmoe_format import container
from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.checkpoints.model import model_class
from qmoe_format.errors import QMoEError
from qmoe_format.export.compressed_folder import CONFIG_FILE
from qmoe_format.hub import find_qmoe_file
from qmoe_format.machine import check_device, out_of_memory
from qmoe_format.remote import RemotePath
from qmoe_format.runtime.expert_memory import place_experts
from qmoe_format.runtime.experts import compressed_modules
from qmoe_format.runtime.model_of_file import checked_config, dense_state
from qmoe_format.runtime.plugin import QMoEConfig


def load_model(
    path: str | os.PathLike[str] | RemotePath,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    expert_memory: int | None = None,
    exact: bool = False,
) -> transformers.PreTrainedModel:
    """Load a model whose experts stay in the file, compressed; do not change the file meanwhile.

    Args:
        path: a ``.qmoe`` file, the index file of shards, the URL of either, or the Hub's name of a
            repository that holds one, such as ``ORG/MODEL``. From a URL, an expert is read when it
            is first used, and then kept, compressed.
        device: where the model computes; the experts are copied to a GPU compressed.
        dtype: of everything but the experts; None: the one in ``config.json``.
        trust_remote_code: run Python code in the file, if the configuration needs that.
        expert_memory: bytes of experts to keep in memory on a CPU; others are read when they are
            needed. None: map the file into memory, or, if its experts do not fit into the memory
            that is available, keep as many as do. Experts in use are also kept in a faster layout
            of 2 or 4 bits a weight if there is room.
        exact: on a CPU, multiply with activations as they are; by default they are rounded to 8
            bits, which makes products several times as fast.

    Returns:
        A model of transformers in evaluation mode.

    Raises:
        QMoEError: the codes of ``open`` and of reading; ``not-found`` without ``config.json``;
            ``checkpoint`` for an unknown family, or if configuration and tensors do not belong
            together; ``argument`` for a device that torch cannot use, or for ``expert_memory`` that
            is below 1 or not for a CPU; on a GPU also ``dependency``, ``device`` and ``memory``.

    Example::

        model = load_model("model.qmoe")
        tokenizer = load_tokenizer("model.qmoe")
        inputs = tokenizer("Once upon a time", return_tensors="pt")
        print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
    """
    check_device(device)
    on_cpu = torch.device(device).type == "cpu"
    if expert_memory is not None and not on_cpu:
        raise QMoEError(
            "argument",
            "the memory for experts can be limited on a CPU only",
            "leave out expert_memory (--expert-memory)",
        )
    path = find_qmoe_file(path)
    with container.open(path) as file, checked_config(file, trust_remote_code) as (folder, config):
        config.quantization_config = QMoEConfig(str(path.absolute())).to_dict()
        kind = model_class(config)
        try:
            model = kind.from_pretrained(
                None,
                config=config,
                state_dict=dense_state(file),
                dtype=dtype or "auto",
                generation_config=_generation_config(folder),
            )
        except Exception as error:  # whatever transformers makes of a wrong config.json
            if isinstance(error, QMoEError) or out_of_memory(error):
                raise
            raise QMoEError(
                "checkpoint",
                f"{file.path}: transformers cannot load this model ({error})",
                "convert the checkpoint again, or update transformers",
            ) from error
    model.name_or_path = model.config.name_or_path = str(path)
    model.to(device)
    if on_cpu and (exact or expert_memory is not None):  # otherwise that is done already
        place_experts(model, expert_memory, exact=exact)
    if model.device.type == "cuda":  # otherwise each layer would do this when it is first used
        modules = (module for _, module in compressed_modules(model))
        stacks = [stack for module in modules for stack in module.compressed.stacks]
        for stack in stacks:
            stack.upload(model.device.index, runs=False)
        for stack in stacks:  # with the memory that is left
            stack.add_runs(model.device.index)
    return model


def load_original(
    folder: str | Path | RemotePath, dtype: torch.dtype, trust_remote_code: bool = False
) -> Any:
    """Load a checkpoint as it was published, quantized weights as what they stand for.

    Args:
        folder: with ``config.json`` and weights.
        dtype: of all weights but those that transformers keeps in float32; they are rounded once.
        trust_remote_code: run Python code in the folder, if the configuration needs that.

    Returns:
        A model of transformers in evaluation mode, on the CPU.

    Raises:
        QMoEError: the codes of ``open_checkpoint``; ``checkpoint`` if transformers cannot load it.
    """
    with open_checkpoint(folder, trust_remote_code=trust_remote_code) as checkpoint:
        config = checkpoint.model_config

        def weights(name: str) -> torch.Tensor:
            packed = checkpoint.packed.get(name)
            if packed:
                return packed.decode(checkpoint.read_stored).to(dtype)
            return checkpoint.read(name).clone()  # some stay in float32, as transformers knows

        try:
            model = model_class(config).from_pretrained(
                None,
                config=config,
                state_dict={name: weights(name) for name in checkpoint.tensors},
                dtype=dtype,
                generation_config=_generation_config(checkpoint.folder),
            )
        except Exception as error:  # as above
            if isinstance(error, QMoEError) or out_of_memory(error):
                raise
            raise QMoEError(
                "checkpoint",
                f"{folder}: transformers cannot load it ({error})",
                "fetch the original checkpoint again, or update transformers",
            ) from error
    return model.eval()


def _generation_config(folder: Path) -> Any:
    """From where ``from_pretrained`` looks for it: old checkpoints have it in ``config.json``."""
    configs = transformers.GenerationConfig
    try:
        return configs.from_pretrained(folder)
    except OSError:
        return configs.from_pretrained(folder, CONFIG_FILE, _from_model_config=True)
