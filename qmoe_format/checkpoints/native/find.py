"""Which stored tensors make up which weights.

Names, dtypes and shapes decide; the configuration is asked only for what they do not tell. What
looks quantized but is not understood is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from qmoe_format.checkpoints.native.awq import awq
from qmoe_format.checkpoints.native.block_scaled import FP8_DTYPES, block_scaled
from qmoe_format.checkpoints.native.fp4 import fp4, gpt_oss
from qmoe_format.checkpoints.native.gptq import gptq
from qmoe_format.checkpoints.native.module import Module
from qmoe_format.checkpoints.native.pack_quantized import pack_quantized
from qmoe_format.checkpoints.native.packed_tensor import (
    E8M0_DTYPES,
    FLOAT_DTYPES,
    PackedTensor,
    refusal,
)
from qmoe_format.checkpoints.native.quantization import METHODS, Quantization
from qmoe_format.checkpoints.tensor_info import TensorInfo
from qmoe_format.errors import QMoEError

_BYTES = ("U8", "I8")
_WORDS = ("I32", "U32")
_WEIGHTS = ("weight", "weight_packed", "qweight")
# Last parts of names that mean nothing without codes beside them.
_PART = re.compile(
    r"weight_(scale|scale_inv|scale_2|global_scale|shape|zero_point|g_idx)|qzeros|.+_scale_inv"
)
# Tensors without which a module computes something else.
_CORRECTIONS = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
_USE_FLOATS = "convert the model in a float type, for instance after dequantizing it"


def find_packed(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, PackedTensor]:
    """Find the weights that a checkpoint stores as codes and scales.

    Args:
        config: the contents of ``config.json``.
        tensors: the stored tensors by name.

    Returns:
        The weights by their names in the float model; empty if all are stored as numbers.

    Raises:
        QMoEError: ``checkpoint`` if parts are missing or do not fit each other, or if something is
            quantized in a way that is not supported.
    """
    quantization = Quantization(config)
    found: dict[str, PackedTensor] = {}
    unknown: list[TensorInfo] = []
    for module in _modules(tensors):
        packed = [each for leaf in module.tensors if (each := _pack(module, leaf, quantization))]
        for each in packed:
            if each.name in found or (each.name in tensors and each.name not in each.parts):
                raise refusal(each.name, f"is stored twice, also as {each.format}")
            found[each.name] = each
        others = [leaf for leaf in module.tensors if leaf not in module.claimed]
        strange = [leaf for leaf in others if _looks_packed(module.tensors[leaf], quantization)]
        unknown += [module.tensors[leaf] for leaf in strange]
        if not strange:
            _check_others(module, others, packed)
    method = quantization.method
    if (found or unknown) and method not in ("", *METHODS):
        name = unknown[0].name if unknown else next(iter(found.values())).parts[0]
        raise refusal(
            name, f"is quantized by quant_method {method!r}, which is not supported", _USE_FLOATS
        )
    if not found and not quantization.settings:  # then FP8 is just a dtype, and bytes may be masks
        unknown = [info for info in unknown if _is_weight(info) and info.dtype not in FP8_DTYPES]
    if unknown:
        raise _unknown(unknown[0], quantization)
    return found


def _modules(tensors: Mapping[str, TensorInfo]) -> Iterator[Module]:
    """The modules that have more than plain floats."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in modules:
            modules[module][leaf] = info
        else:
            modules[module] = {leaf: info}
    for name, own in modules.items():
        for leaf, info in own.items():
            if info.dtype not in FLOAT_DTYPES or _is_part(leaf):
                yield Module(name, own)
                break


@lru_cache
def _is_part(leaf: str) -> bool:
    return bool(_PART.fullmatch(leaf))


def _pack(module: Module, leaf: str, quantization: Quantization) -> PackedTensor | None:
    """The weight whose codes are the tensor ``leaf``, if they are any."""
    dtype = module.tensors[leaf].dtype
    if dtype in FLOAT_DTYPES or leaf in module.claimed:
        return None
    if leaf == "qweight":
        return _qweight(module, quantization)
    if leaf == "weight_packed":
        if dtype != "U8":
            return pack_quantized(module, quantization)
        return fp4(module, leaf, module.require("weight_scale", ("F8_E4M3", *E8M0_DTYPES), leaf))
    if dtype == "U8" and leaf.endswith("_blocks"):
        return gpt_oss(module, leaf)
    if dtype not in (*FP8_DTYPES, *_BYTES) or (scale := module.scale_of(leaf)) is None:
        return None
    if dtype in _BYTES and scale.dtype in ("F8_E4M3", *E8M0_DTYPES):
        return fp4(module, leaf, scale)
    return None if dtype == "U8" else block_scaled(module, leaf, scale, quantization)


def _qweight(module: Module, quantization: Quantization) -> PackedTensor:
    method = quantization.method
    if method == "awq" or quantization.word("packing_format").endswith("awq"):
        return awq(module, quantization)
    if method in ("gptq", "gptqmodel", "auto-round"):
        return gptq(module, quantization)
    raise refusal(
        module.full("qweight"),
        f"is quantized by quant_method {method!r} in config.json, neither GPTQ nor AWQ",
        _USE_FLOATS if method else "add the quantization_config of the model's author",
    )


def _is_weight(info: TensorInfo) -> bool:
    return info.name.rpartition(".")[2] in _WEIGHTS


def _looks_packed(info: TensorInfo, quantization: Quantization) -> bool:
    if info.dtype in (*FLOAT_DTYPES, "BOOL", "I64", "U64") or len(info.shape) < 2:
        return False
    known = quantization.method in ("", *METHODS)
    return not (known and info.dtype in _WORDS) or _is_weight(info)


def _check_others(module: Module, leaves: Sequence[str], packed: Sequence[PackedTensor]) -> None:
    """Refuse tensors that would be part of a packed one, or change what it means."""
    names = [each.name.rpartition(".")[2] for each in packed]
    for leaf in leaves:
        if packed and (
            leaf in _CORRECTIONS
            or any(leaf.startswith(f"{name}_") and not leaf.endswith("_bias") for name in names)
        ):
            problem = f"what it does to {packed[0].name!r} ({packed[0].format}) is not known"
        elif _is_part(leaf) or (leaf.endswith("_scales") and module.tensors[leaf].dtype == "U8"):
            problem = "is part of a quantized weight, but there is none beside it"
        else:
            continue
        raise refusal(module.full(leaf), problem, f"if the checkpoint is complete, {_USE_FLOATS}")


def _unknown(info: TensorInfo, quantization: Quantization) -> QMoEError:
    if info.dtype in FP8_DTYPES:
        return refusal(
            info.name,
            f"is {info.dtype} without a scale: there is neither {info.name + '_scale_inv'!r} nor "
            f"{info.name + '_scale'!r}",
            "download the whole checkpoint again, or convert the model in another float type",
        )
    method = f"quant_method {quantization.method!r}" if quantization.method else "config.json"
    return refusal(
        info.name,
        f"is {info.dtype} {list(info.shape)}; how {method} quantizes it is not known",
        _USE_FLOATS,
    )
