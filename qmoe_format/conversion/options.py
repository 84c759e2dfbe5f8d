"""What a user may ask of a calibrated conversion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from qmoe_format.errors import QMoEError


@dataclass(frozen=True, slots=True)
class Calibration:
    """The text that shows a quantizer what the experts are given, and how it is used.

    Attributes:
        text: a ``.jsonl``, ``.txt`` or ``.parquet`` file.
        text_column: the key or column of the text in it.
        target_column: that of what the decoder should write for each text, for an encoder-decoder
            that was not trained, or not only, to fill in spans.
        sequence_length: tokens that the model reads at once; by default 256 for an encoder,
            otherwise 2048 or the most it can read. Text is cut into windows of this length; longer
            texts and targets of pairs are truncated.
        samples: how many sequences to choose; by default all.
        seed: for that choice, and for the spans that an encoder-decoder has to fill in.
        token_cap: use at most this many times the experts' mean number of tokens for an expert.
        mask_special_tokens: leave special tokens, such as sentinels and ends of sequences, out of
            the Hessians, as QMoE does. Nothing then keeps what the model makes of these tokens.
        device: where torch computes, such as ``cpu`` or ``cuda``.
    """

    text: str | Path
    text_column: str = "text"
    target_column: str | None = None
    sequence_length: int | None = None
    samples: int | None = None
    seed: int = 0
    token_cap: float = 4.0
    mask_special_tokens: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_positive("token_cap", self.token_cap)


@dataclass(frozen=True, slots=True)
class Target:
    """How small the experts are to be: ``bits`` a weight, or a given ``lam``, or neither.

    Bits are total: scales, lengths and dictionaries are included. For ``lam`` see
    ``qmoe_format.quantize.rd.Rate``.
    """

    bits: float | None = None
    lam: float | None = None

    def __post_init__(self) -> None:
        check_positive("bits_per_weight", self.bits)
        check_positive("rate_lambda", self.lam)
        if self.bits is not None and self.lam is not None:
            raise QMoEError(
                "argument", "bits_per_weight and rate_lambda exclude each other: give one of them"
            )


def check_positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise QMoEError("argument", f"{name} is {value}; it has to be a number above 0")
