"""GPTQ and AWQ.

AWQ is compared with compressed-tensors' converter of AutoAWQ's checkpoints. GPTQModel, which
defines GPTQ, needs another torch than this package's tests: GPTQ is compared with its rule, written
here for one weight at a time.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("compressed_tensors", reason="needs the extra 'test'")
import hypothesis.strategies as st
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from torch import Tensor

from tests.checkpoints.native_tensors import codes, decode, find, same, scales
from tests.refusals import refusal

Tensors = dict[str, Tensor]


def words(*shape: int, seed: int = 0) -> Tensor:
    return codes(*shape, dtype=torch.int32, seed=seed)


def gptq_stored(bits: int, rows: int, columns: int, group: int, seed: int = 0) -> Tensors:
    groups = -(-columns // group)
    return {
        "x.qweight": words(-(-columns * bits // 32), rows, seed=seed),
        "x.qzeros": words(groups, -(-rows * bits // 32), seed=seed + 1),
        "x.scales": scales(groups, rows, dtype=torch.float16, seed=seed),
        "x.g_idx": torch.arange(columns, dtype=torch.int32) // group,
    }


def numbers(packed: Tensor, bits: int, count: int) -> list[int]:
    """The numbers of a row of words, taken from one large number."""
    whole = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(packed.tolist()))
    return [whole >> bits * i & (1 << bits) - 1 for i in range(count)]


def zero_points(packed: Tensor, bits: int, count: int, version: int) -> list[int]:
    """Version 1: one more, by adding to whole words except for 3 bits."""
    if version == 1 and bits == 3:
        return [(number + 1) % 8 for number in numbers(packed, bits, count)]
    ones = sum(1 << i for i in range(0, 32, bits)) if version == 1 else 0
    return numbers((packed.long() + ones) % 2**32, bits, count)


def gptq_decoded(tensors: Tensors, bits: int, version: int) -> Tensor:
    scale, order = tensors["x.scales"].float().numpy(), tensors["x.g_idx"].tolist()
    rows, columns = scale.shape[1], len(order)
    zeros = [zero_points(row, bits, rows, version) for row in tensors["x.qzeros"]]
    weight = np.empty((rows, columns), np.float32)
    for row in range(rows):
        for column, code in enumerate(numbers(tensors["x.qweight"][:, row], bits, columns)):
            group = order[column]
            weight[row, column] = np.float32(code - zeros[group][row]) * scale[group, row]
    return torch.from_numpy(weight)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 4).map(lambda i: 32 * i),
    columns=st.integers(1, 3).map(lambda i: 32 * i),
    group=st.sampled_from([8, 32, 40, 64, 96]),
    version=st.sampled_from([1, 2]),
    act_order=st.booleans(),
    seed=st.integers(0, 9),
)
def test_gptq(
    bits: int, rows: int, columns: int, group: int, version: int, act_order: bool, seed: int
) -> None:
    tensors = gptq_stored(bits, rows, columns, group, seed)
    if act_order:
        generator = torch.Generator().manual_seed(seed)
        tensors["x.g_idx"] = tensors["x.g_idx"][torch.randperm(columns, generator=generator)]
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    (packed,) = find(quantization, tensors).values()
    assert (packed.name, packed.format) == ("x.weight", f"gptq int{bits}")
    assert same(decode(quantization, tensors), gptq_decoded(tensors, bits, version))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_of_sizes_that_fill_no_word(bits: int) -> None:
    tensors = gptq_stored(bits, 67, 71, 16)
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": 16}
    assert same(decode(quantization, tensors), gptq_decoded(tensors, bits, 1))


@pytest.mark.parametrize(("group_size", "group"), [(16, 16), (-1, 64)])
def test_gptq_without_an_order(group_size: int, group: int) -> None:
    tensors = gptq_stored(4, 32, 64, group)
    order = tensors.pop("x.g_idx")
    for name, version in (("auto_round:auto_gptq", 1), ("auto_round", 2)):
        quantization = {
            "quant_method": "auto-round",
            "packing_format": name,
            "bits": 4,
            "group_size": group_size,
        }
        expected = gptq_decoded({**tensors, "x.g_idx": order}, 4, version)
        assert same(decode(quantization, tensors), expected)
    other = {**quantization, "group_size": 24}
    message = refusal(lambda: find(other, tensors), "checkpoint")
    assert "but no g_idx, and config.json has groups of 24" in message


def test_bits_that_differ_by_layer() -> None:
    """GPTQModel's ``dynamic``: shapes tell."""
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    tensors = gptq_stored(8, 64, 64, 32)
    assert same(decode(quantization, tensors), gptq_decoded(tensors, 8, 1))


@pytest.mark.parametrize("wrong", [2, -1, 1 << 32])
def test_a_group_that_is_not_there(wrong: int) -> None:
    tensors = gptq_stored(4, 32, 64, 32)
    tensors["x.g_idx"] = tensors["x.g_idx"].long()
    tensors["x.g_idx"][5] = wrong
    message = refusal(lambda: decode({"quant_method": "gptq"}, tensors), "checkpoint")
    assert "'x.g_idx': names a group that is not one of 2" in message


@settings(deadline=None, max_examples=40)
@given(
    eighths=st.integers(2, 20),  # with 1, the library fails
    groups=st.integers(1, 4),
    group=st.integers(1, 70),
    seed=st.integers(0, 9),
)
def test_awq(eighths: int, groups: int, group: int, seed: int) -> None:
    columns = groups * group
    tensors = {
        "x.qweight": words(columns, eighths, seed=seed),
        "x.qzeros": words(groups, eighths, seed=seed + 1),
        "x.scales": scales(groups, 8 * eighths, dtype=torch.float16, seed=seed),
    }
    quantization = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group}
    (packed,) = find(quantization, tensors).values()
    assert (packed.name, packed.format) == ("x.weight", "awq int4")
    converted = AutoAWQConverter(group_size=group).process(dict(tensors))
    own = {name.removeprefix("x."): tensor for name, tensor in converted.items()}
    own["weight_scale"] = own["weight_scale"].float()
    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=group, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    assert same(decode(quantization, tensors), compressor.decompress(own, scheme)["weight"])
