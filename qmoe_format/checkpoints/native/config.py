"""``quantization_config`` of a checkpoint whose experts are no longer in its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# By ``quant_method``, the list of modules that are in a float type.
_EXCEPT = {
    "awq": "modules_to_not_convert",
    "compressed-tensors": "ignore",
    "fbgemm_fp8": "modules_to_not_convert",
    "fp8": "modules_to_not_convert",
    "gptq": "modules_to_not_convert",
    "modelopt": "ignore",
    "mxfp4": "modules_to_not_convert",
}


def without_experts(config: Mapping[str, Any], experts: Sequence[str]) -> dict[str, Any]:
    """The contents of ``config.json`` for a checkpoint whose ``experts`` are in a float type.

    Args:
        experts: names of modules.
    """
    quantization, text = config.get("quantization_config"), config.get("text_config")
    if quantization:
        key = _EXCEPT.get(quantization.get("quant_method", ""), "modules_to_not_convert")
        changed = {**quantization, key: [*(quantization.get(key) or ()), *experts]}
        return {**config, "quantization_config": changed}
    return {**config, "text_config": without_experts(text, experts)} if text else dict(config)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``config.json`` for a checkpoint in float types."""
    changed = {
        key: without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != "quantization_config"
    }
    of_codes = [key for key in ("dtype", "torch_dtype") if "float8" in str(config.get(key))]
    return changed | dict.fromkeys(of_codes, "bfloat16")
