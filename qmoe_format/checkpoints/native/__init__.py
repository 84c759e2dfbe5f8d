"""Weights as quantized checkpoints store them, found by name and decoded one matrix at a time.

``find_packed`` tells which stored tensors make up which weight of the float model; a
``PackedTensor`` decodes one to float32, to the bit as the library that defines its format does in
float32:

    block_scaled    FP8 and int8 with a scale for each block, row or tensor; MXFP8
    fp4             MXFP4 and NVFP4
    pack_quantized  compressed-tensors' integers of 1 to 8 bits
    gptq, awq       the integers of GPTQModel and AutoAWQ
"""

from qmoe_format.checkpoints.native.find import find_packed
from qmoe_format.checkpoints.native.packed_tensor import PackedTensor, Read

__all__ = ["PackedTensor", "Read", "find_packed"]
