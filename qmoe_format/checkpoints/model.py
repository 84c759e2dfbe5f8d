"""Transformers' model of a checkpoint, without weights: the registry that all the rest asks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from torch import nn
from transformers import conversion_mapping
from transformers.models.auto import modeling_auto

from qmoe_format.checkpoints.families import family_for
from qmoe_format.checkpoints.registry import ALIASES, check_supported
from qmoe_format.errors import QMoEError
from qmoe_format.machine import out_of_memory

MAX_COUNT = 1 << 12
"""Of layers, or of parts of one: no model has more, and building such a model might not end."""

_COUNT = re.compile(r"(.*_)?(layers?|depth|(num|n)_(.*_)?(experts?|groups))")
_CLASSES = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
)


def _register(alias: str, model_type: str) -> None:
    """Let transformers take models of the type ``alias`` for those of another."""
    original = transformers.CONFIG_MAPPING[model_type]
    config = type(original.__name__, (original,), {"model_type": alias})
    transformers.AutoConfig.register(alias, config)
    model = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[original]
    transformers.AutoModelForCausalLM.register(config, model, exist_ok=True)
    rules = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
    conversion_mapping.register_checkpoint_conversion_mapping(alias, rules)


for _alias, _model_type in ALIASES.items():
    if _alias not in transformers.CONFIG_MAPPING:
        _register(_alias, _model_type)


def load_config(folder: Path, raw: Mapping[str, Any], trust_remote_code: bool = False) -> Any:
    """The configuration in ``folder`` as an object of transformers, of weights in a float type.

    Args:
        raw: the contents of its ``config.json``.
        trust_remote_code: whether code that the checkpoint brings may run.

    Raises:
        QMoEError: ``checkpoint`` if transformers does not know the type or refuses the file, or if
            the model would be huge.
    """
    name = raw.get("model_type")
    check_supported(str(name))
    known = isinstance(name, str) and name in transformers.CONFIG_MAPPING
    if not (known or (trust_remote_code and "auto_map" in raw)):
        raise QMoEError(
            "checkpoint",
            f"config.json: transformers {transformers.__version__} does not know the model_type "
            f"{name!r}",
            "update transformers, or see the types that convert in `qmoe families`",
        )
    _check_values(raw)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder,
            local_files_only=True,
            # Transformers' own class where there is one, whatever ``auto_map`` names.
            trust_remote_code=trust_remote_code and not known,
        )
        if not isinstance(config.dtype, torch.dtype | None):
            raise TypeError(f"its dtype is {config.dtype!r}")
    except Exception as error:  # a wrong config.json can raise anything in transformers
        raise _refused(error) from error
    for each in (config, config.get_text_config()):
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    if config.dtype is not None and config.dtype.itemsize == 1:  # of codes, not of the model
        config.dtype = torch.bfloat16
    # A choice for other machines, such as flash_attention_2: transformers' own default runs on all.
    config._attn_implementation = None
    return config


def _check_values(raw: Mapping[str, Any]) -> None:
    pending = [raw]
    while pending:
        for key, value in pending.pop().items():
            if key == "model_type" and not isinstance(value, str | None):
                problem = "not a name"
            elif isinstance(value, Mapping):
                pending.append(value)
                continue
            elif _COUNT.fullmatch(key) and isinstance(value, int) and value > MAX_COUNT:
                problem = f"more than {MAX_COUNT}"
            else:
                continue
            raise QMoEError(
                "checkpoint",
                f"config.json: {key!r} is {shorten(str(value), 500)}, which is {problem}",
                "download it again",
            )


def model_class(config: Any) -> Any:
    """The class that ``config.json`` names, or else transformers' first choice for language.

    Raises:
        QMoEError: ``checkpoint`` if there is none.
    """
    listed = config.architectures if isinstance(config.architectures, list) else []
    classes = [getattr(transformers, str(name), None) for name in listed]
    kinds = [(each, getattr(each, "config_class", None) or ()) for each in classes]
    named = [each for each, kind in kinds if isinstance(config, kind)]
    wrapper = config.get_text_config() is not config  # its weights are not only of language
    mappings = reversed(_CLASSES) if wrapper else _CLASSES
    by_type = (mapping.get(type(config), None) for mapping in mappings)
    for found in (*named, *by_type):
        if found is not None and hasattr(found, "generate"):
            return found
    raise QMoEError(
        "checkpoint",
        f"config.json: transformers has no language model for the type {config.model_type!r}",
        "see the types that convert in `qmoe families`",
    )


def build(config: Any) -> Any:
    """The model, all of whose parameters and buffers are on the device ``meta``.

    Raises:
        QMoEError: ``checkpoint`` if transformers cannot build it.
    """
    kind = model_class(config)
    try:
        with torch.device("meta"), family_for(config).building():
            # A copy, for this changes the configuration's dtype.
            return kind._from_config(deepcopy(config), dtype=torch.float32).eval()
    except Exception as error:
        raise _refused(error) from error


@contextmanager
def running(whose: str) -> Iterator[None]:
    """Say so if transformers cannot run a model that it could build.

    Raises:
        QMoEError: ``checkpoint``.
    """
    try:
        yield
    except Exception as error:  # a wrong config.json can raise anything here, too
        if isinstance(error, QMoEError | OSError) or out_of_memory(error):
            raise
        raise QMoEError(
            "checkpoint",
            f"transformers cannot run the {whose} model ({shorten(str(error), 500)})",
            "correct config.json and generation_config.json, or update transformers",
        ) from error


def fill_buffers(model: Any, module: nn.Module, device: str) -> None:
    """Compute the tables in ``module``, a part of ``model``, that no checkpoint has.

    Rotary embeddings, for one. Transformers' ``from_pretrained`` computes them the same way.
    """
    owners = [each for each in model.modules() if isinstance(each, transformers.PreTrainedModel)]
    for part in module.modules():
        tables = {
            name: buffer
            for name, buffer in part.named_buffers(recurse=False)
            if name in part._non_persistent_buffers_set and buffer.is_meta
        }
        if not tables:
            continue
        for name, buffer in tables.items():
            part._buffers[name] = torch.empty_like(buffer, device=device)
        owner = [each for each in owners if part in each.modules()][-1]
        with torch.device(device):
            owner._init_weights(part)


def _refused(error: Exception) -> QMoEError:
    return QMoEError(
        "checkpoint",
        f"config.json: transformers cannot build this model ({shorten(str(error), 500)})",
        "download it again or update transformers",
    )
