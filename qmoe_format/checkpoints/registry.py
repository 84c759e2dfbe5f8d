"""Which types of models convert, and why the others do not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from qmoe_format.errors import QMoEError

# Types that transformers does not know, and those whose configuration and names they share.
ALIASES = {"kimi_k2": "deepseek_v3"}

UNSUPPORTED: Mapping[str, str] = {
    "dbrx": "the experts of a layer are one matrix",
    "diffusion_gemma": "its encoder and its decoder have the same experts",
    "ernie4_5_vl_moe": "its checkpoints mix the experts for text with those for images",
    "gemma4_assistant": "it reads keys and values of another model",
    "jetmoe": "its attention has experts, too",
    "longcat_flash": "transformers expects weights of experts that have none in its checkpoints",
    "muse_spark": "the output of each expert is normalized",
    "nllb-moe": "transformers sends tokens to other experts than the router chooses",
}
"""Types with experts that do not convert, and the reason."""

UNCALIBRATED: Mapping[str, str] = {
    "inkling2": "a block reads what many blocks before it have returned",
    "inkling2_text": "a block reads what many blocks before it have returned",
    "zaya": "a router reads what the router of the block before has computed",
}
"""Types that convert by rounding only, and the reason."""

_CLASSES = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
_EXPERTS = re.compile(r"^class \w+Experts\(nn\.Module", re.MULTILINE)
_TEXT = re.compile(r'"text_config": SubConfigSpec\(.*model_type="(\w+)"')


def supported_types() -> tuple[str, ...]:
    """All that convert, in order: language models whose code in transformers has experts."""
    models = Path(transformers.__file__).parent / "models"
    sources = models.glob("*/modeling_*.py")
    modules = {path.parent.name for path in sources if _EXPERTS.search(path.read_text("utf-8"))}
    for path in models.glob("*/configuration_*.py"):  # those that contain another language model
        inner = _TEXT.search(path.read_text("utf-8"))
        if inner and model_type_to_module_name(inner[1]) in modules:
            modules.add(path.parent.name)
    types = {name for names in _CLASSES for name in names}
    found = {name for name in types if model_type_to_module_name(name) in modules}
    return tuple(sorted((found | ALIASES.keys()) - UNSUPPORTED.keys()))


def check_supported(model_type: str) -> None:
    """Refuse a type of model that does not convert.

    Raises:
        QMoEError: ``checkpoint``, with the reason.
    """
    if model_type in UNSUPPORTED:
        raise QMoEError(
            "checkpoint",
            f"config.json: models of type {model_type!r} do not convert: {UNSUPPORTED[model_type]}",
            "see the types that convert in `qmoe families`",
        )


def check_calibrated(model_type: str) -> None:
    """Refuse a type of model that converts only by rounding.

    Raises:
        QMoEError: ``checkpoint``, with the reason.
    """
    if model_type in UNCALIBRATED:
        raise QMoEError(
            "checkpoint",
            f"models of type {model_type!r} cannot be calibrated: {UNCALIBRATED[model_type]}",
            "convert the model without calibration text",
        )
