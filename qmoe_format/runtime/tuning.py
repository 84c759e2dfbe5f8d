"""Where one kernel becomes faster than another, and how much memory a product may use."""

from __future__ import annotations

from dataclasses import dataclass, field

from qmoe_format.machine import cores


@dataclass(frozen=True, slots=True)
class Tuning:
    """Thresholds of the products; ``benchmarks/products.py`` measures those of the CPU.

    Attributes:
        threads: of a product on the CPU.
        pairs: (token, expert) pairs whose activations are in memory at a time, approximately.
        matvec_tokens: up to this many tokens of an expert are multiplied one at a time.
        dense_tokens: tokens of an expert, times its share of non-zero weights, from which decoding
            the weights for a dense product pays: a product from codewords takes time for each
            non-zero, a dense one for each weight.
        grouped_dense_tokens: tokens of an expert from which that pays with ``int-group``.
        weights_per_thread: weights for which waking another thread pays.
        packed_per_thread: the same, times tokens, of packed matrices.
        scratch_bytes: of decoded weights at a time.
        gpu_layer_tokens: up to this many tokens, a layer on a GPU takes one call, or one per stack.
        gpu_expert_tokens: up to this many tokens of an expert, a GPU multiplies weights as they
            are stored. (On an H100, decoding paid from about 20 at 60 % zeros, 40 at 88.5 %, when
            tokens went one after another; on tensor cores that has not been measured.)
    """

    threads: int = field(default_factory=cores)
    pairs: int = 256
    matvec_tokens: int = 2
    dense_tokens: float = 17.0
    grouped_dense_tokens: int = 48
    weights_per_thread: int = 1 << 18
    packed_per_thread: int = 1 << 20
    scratch_bytes: int = 8 << 20
    gpu_layer_tokens: int = 64
    gpu_expert_tokens: int = 32
