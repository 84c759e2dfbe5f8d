"""A model and its tokenizer from one ``.qmoe`` file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qmoe_format import container
from qmoe_format.checkpoints import check_layers
from qmoe_format.checkpoints.torch_dtypes import TORCH_DTYPES
from qmoe_format.checkpoints.wiring import family_for
from qmoe_format.errors import QMoEError
from qmoe_format.export.compressed_folder import CONFIG, METHOD, read_config
from qmoe_format.machine import check_device, out_of_memory
from qmoe_format.runtime.install import upload

if TYPE_CHECKING:
    from qmoe_format.container import QMoEFile, ShardedFile


def load_model(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model of a ``.qmoe`` file, in evaluation mode.

    The experts stay in the file, which is mapped: it must not be changed while the model is used.

    Args:
        path: a ``.qmoe`` file, or the index file of shards.
        device: where the model computes. On a GPU the experts are copied there, compressed.
        dtype: of everything but the experts; None: the one in ``config.json``.

    Raises:
        QMoEError: the codes of ``open`` and of reading; ``not-found`` without ``config.json``;
            ``checkpoint`` for a family that cannot be run, or if configuration and tensors do not
            belong together; ``argument`` for a device that torch cannot use; on a GPU also
            ``dependency``, ``device`` and ``memory``.
    """
    check_device(device)
    with container.open(path) as file, _attachments(file) as folder:
        described = read_config(file)
        family = family_for(described)
        check_layers(described, file.tensors)
        state = {
            name: _tensor(file, name) for name, entry in file.tensors.items() if not entry.stack
        }
        kinds = (
            MODEL_FOR_CAUSAL_LM_MAPPING
            if len(family.stages) == 1
            else MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        )
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            config.quantization_config = {
                "quant_method": METHOD,
                "file": str(Path(path).absolute()),
            }
            model = kinds[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype or "auto",
                generation_config=_generation_config(folder),
            )
        except Exception as error:  # whatever transformers makes of a wrong config.json
            if isinstance(error, QMoEError) or out_of_memory(error):
                raise
            raise QMoEError(
                "checkpoint",
                f"{file.path}: transformers cannot load this model ({error}); convert the "
                "checkpoint again, or update transformers",
            ) from error
    model.name_or_path = model.config.name_or_path = os.fspath(path)
    model.to(device)
    if model.device.type == "cuda":
        upload(model, model.device.index)
    return model


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that is attached to a ``.qmoe`` file.

    Raises:
        QMoEError: the codes of ``open`` and of reading; ``not-found`` if there is none that
            transformers knows.
    """
    with container.open(path) as file, _attachments(file) as folder:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            # Some classes make an empty vocabulary where there is none.
            vocabularies = set(tokenizer.vocab_files_names.values())
            if vocabularies and vocabularies.isdisjoint(file.attachments):
                raise ValueError(f"there is none of {', '.join(sorted(vocabularies))}")
        except Exception as error:  # as various as tokenizers are
            raise QMoEError(
                "not-found",
                f"{file.path}: has no tokenizer that transformers can load ({error}); put its "
                "files beside the checkpoint's config.json and convert it again",
            ) from error
    return tokenizer


@contextmanager
def _attachments(file: QMoEFile | ShardedFile) -> Iterator[Path]:
    """The attached files in a folder of their own, while it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        for name in file.attachments:
            (Path(folder) / name).write_bytes(file.attachment(name))
        yield Path(folder)


def _generation_config(folder: Path) -> Any:
    """As ``from_pretrained`` finds it: old checkpoints have it in ``config.json``."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_pretrained(folder, CONFIG, _from_model_config=True)


def _tensor(file: QMoEFile | ShardedFile, name: str) -> torch.Tensor:
    array = file.read(name)
    if not array.flags.writeable:  # a view of the file: whoever wrote to it would be killed
        array = array.copy()
    return torch.from_numpy(array).view(TORCH_DTYPES[file.tensors[name].dtype])
