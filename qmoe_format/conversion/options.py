"""What a user may ask of a conversion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qmoe_format.codec import PROFILES, Profile
from qmoe_format.conversion.methods import Method, Methods, Rule
from qmoe_format.errors import QMoEError
from qmoe_format.quantize import recipe as find_recipe


@dataclass(frozen=True, slots=True)
class Calibration:
    """Text that the model reads, so that a quantizer sees the inputs of each expert.

    Attributes:
        text: a ``.jsonl``, ``.json``, ``.txt`` or ``.parquet`` file, or a data set of the Hub; see
            ``qmoe_format.calibration.text.read_documents``.
        text_column: the key or column of the text, or of chats, in it.
        target_column: the key or column of what the decoder should write for each text, for an
            encoder-decoder trained on more than filling in spans.
        sequence_length: tokens in a sequence; by default 256 for an encoder, otherwise 2048 or the
            model's limit. Text is cut into windows of this length; longer text-target pairs are
            truncated.
        samples: how many sequences to choose; by default all.
        seed: of that choice, and of the spans that an encoder-decoder has to fill in.
        token_cap: use at most this many times the mean number of tokens per expert for an expert.
        mask_special_tokens: leave special tokens, such as sentinels and ends of sequences, out of
            the Hessians, as QMoE does. The output of experts for these tokens is then not
            preserved.
        parse_special_tokens: read what is spelled like a special token in a text as that token, as
            it always is in chats. Otherwise it is text.
        device: where torch computes, such as ``cpu`` or ``cuda``.
        all_experts: show every expert all tokens for its Hessians, first those routed to it, then
            the others, up to ``token_cap`` (still relative to the number routed to an expert). What
            the block returns stays as routed. Where importance is weighed, all others together
            count as one token of mean router weight.
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
    all_experts: bool = False
    parse_special_tokens: bool = False

    def __post_init__(self) -> None:
        _check_positive("token_cap", self.token_cap)


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert a checkpoint.

    Attributes:
        recipe: the quantizer's name in ``qmoe_format.quantize.RECIPES``; by default ``rd`` with
            calibration text and ``rtn`` without.
        profile: ``fast`` (decoding speed) or ``size``.
        shard_bytes: start a new file after this many bytes; by default there is one file.
        threads: by default one per core. Without calibration the output does not depend on it;
            with calibration it may, because torch's rounding does.
        overwrite: replace existing output and, unless ``resume`` is set, the work folder of an
            interrupted conversion; otherwise these are errors.
        calibration: text for the recipes that need it.
        bits_per_weight: the size of the experts, scales and dictionaries included, to within
            2 percent; for recipes that weigh error against bits.
        rate_lambda: that trade-off itself, instead; see ``qmoe_format.quantize.rate.Rate``.
        levels: 3 keeps the recipe ``rd`` to ternary weights; by default as many as pay.
        effort: of the recipe ``rd``: ``low``, ``medium`` or ``high``; by default ``medium``.
        bits: of the recipes that have a fixed number.
        grid: ``linear`` or ``log``, for the recipe ``moqe``.
        rules: other recipes for some stacks, ``PATTERN=RECIPE[:CHOICE...]``; the last one that
            matches counts. See ``conversion.methods.Rule``.
        keep_native: leave quantized weights other than experts as the checkpoint stores them,
            instead of converting them to bfloat16.
        resume: continue an interrupted calibrated conversion, which gives the same bytes. Until the
            first block is quantized ``bits_per_weight`` may still change.
        trust_remote_code: run the tokenizer's class if it is code in the checkpoint's folder, and
            attach the code that the folder's configuration files name.

    Raises:
        QMoEError: ``argument`` for options that do not fit each other.
    """

    recipe: str | None = None
    profile: str = "fast"
    shard_bytes: int | None = None
    threads: int | None = None
    overwrite: bool = False
    calibration: Calibration | None = None
    bits_per_weight: float | None = None
    rate_lambda: float | None = None
    levels: int | None = None
    effort: str | None = None
    bits: int | None = None
    grid: str | None = None
    rules: tuple[str, ...] = ()
    keep_native: bool = False
    resume: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        wrong = partial(QMoEError, "argument")
        methods, calibrated = self.methods, self.calibration is not None
        sizes = (self.bits_per_weight, self.rate_lambda)
        _check_positive("bits_per_weight", self.bits_per_weight)
        _check_positive("rate_lambda", self.rate_lambda)
        if None not in sizes:
            raise wrong("bits_per_weight and rate_lambda exclude each other", "give only one")
        for method in methods.all:
            if method.recipe.calibrated and not calibrated:
                problem = f"recipe {method.recipe.name!r} needs calibration text"
                raise wrong(problem, "give some, or choose 'rtn'")
        name = repr(methods.default.recipe.name)
        if calibrated and not any(each.recipe.calibrated for each in methods.all):
            raise wrong(f"recipe {name} does not use calibration text", "leave out one of them")
        if sizes != (None, None) and not methods.rated:
            advice = "use calibration text and the recipe 'rd' to choose bits per weight or lambda"
            raise wrong(f"recipe {name} has one size only", advice)
        if self.resume and not calibrated:
            raise wrong("only calibrated conversions can be resumed", "leave out resume")
        if self.profile not in PROFILES:
            raise wrong(f"unknown profile {self.profile!r}", f"choose {' or '.join(PROFILES)}")

    @property
    def methods(self) -> Methods:
        """The recipe asked for, or the default one, and the rules."""
        calibrated = self.calibration is not None
        recipe = find_recipe(self.recipe or ("rd" if calibrated else "rtn"))
        choices = {
            "levels": self.levels,
            "effort": self.effort,
            "bits": self.bits,
            "grid": self.grid,
        }
        given = {name: value for name, value in choices.items() if value is not None}
        rules = [Rule.parse(rule, calibrated=calibrated) for rule in self.rules]
        return Methods(Method(recipe, given), rules)

    @property
    def codec_profile(self) -> Profile:
        """Codeword width and segment length."""
        return PROFILES[self.profile]


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise QMoEError("argument", f"{name} is {value}", "give a positive number")
