"""What choices in a conversion by ``rd`` are worth: KL at equal bits with one of them changed.

    python -m benchmarks.convert_choices [--model MODEL ...] [--bits B] [--only VARIANT ...]

Writes benchmarks/results/convert_choices.json after each variant. All are measured on the same
windows of the evaluation text, so that a ratio of two KLs is surer than either. Calibration is by a
part of the text; surveys of the original model are shared. ``pooled`` adds to each expert's Hessian
of the block's inputs as many tokens as it has columns, of the average over the experts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import qmoe_format
from benchmarks import report
from benchmarks.evaluation import (
    CALIBRATION_TEXT,
    EVALUATION_TEXT,
    MODELS,
    Model,
    Original,
    load_experts,
    read_text,
    surveys_shared,
)
from benchmarks.report import DATA
from qmoe_format.container.inspection import describe
from qmoe_format.conversion import Calibration, survey
from qmoe_format.conversion.block_experts import BlockExperts
from qmoe_format.quantize import RECIPES, rate, solution
from qmoe_format.quantize.hessian import Statistics
from qmoe_format.quantize.rd import Search, quantize_rd

Record = dict[str, Any]

DEFAULT = "as it is"
BITS, SAMPLES, WINDOWS = 1.2, 60, 60


@dataclass(frozen=True)
class Variant:
    """Constants of modules, fields of ``Search`` and options of ``convert`` to change."""

    constants: Sequence[tuple[Any, str, float]] = ()
    search: Search = field(default_factory=Search)
    pooled: bool = False
    options: tuple[tuple[str, Any], ...] = ()


def absolute(value: float) -> Variant:
    """With errors between relative and absolute ones, see ``rate.Rate``."""
    return Variant([(module, "ABSOLUTE", value) for module in (rate, survey)])


VARIANTS = {
    DEFAULT: Variant(),
    "three levels": Variant(options=(("levels", 3),)),
    "errors count alike in all blocks": Variant([(survey, "POWER", 0.0)]),
    "by what they do in full, not to the power of 0.45": Variant([(survey, "POWER", 1.0)]),
    "errors count relative to the row": absolute(0.0),
    "half as absolutely": absolute(0.3),
    "absolutely to the power of 0.8, not 0.6": absolute(0.8),
    "four times the plain error of weights": Variant(search=Search(damping=0.015)),
    "Hessians pooled": Variant(pooled=True),
    "no lengthening where inputs are rare": Variant(search=Search(lengthen=0.0)),
    "twice the lengthening": Variant(search=Search(lengthen=16.0)),
    "rows not stretched": Variant([(solution, "MAX_STRETCH", 1.0)]),
}

_chosen = DEFAULT


def quantize(*arguments: Any, **choices: Any) -> Any:
    """``quantize_rd`` as the chosen variant searches."""
    return partial(quantize_rd, search=VARIANTS[_chosen].search)(*arguments, **choices)


def pooled(found: dict[str, Statistics], output: str) -> dict[str, Statistics]:
    """Statistics with tokens of the average over experts added to all but the output's."""
    result = dict(found)
    for name, one in found.items():
        if name != output:
            mean = one.sums.sum(0) / one.tokens.sum().clamp(min=1)
            result[name] = replace(one, sums=one.sums + one.sums.shape[-1] * mean)
    return result


@contextmanager
def changed(label: str) -> Iterator[None]:
    """Convert as a variant says."""
    global _chosen
    _chosen, variant, statistics = label, VARIANTS[label], BlockExperts.statistics

    def shared(self: BlockExperts, *arguments: Any) -> dict[str, Statistics]:
        return pooled(statistics(self, *arguments), self._output)

    recipe = replace(RECIPES["rd"], function=f"{__name__}:quantize")
    with ExitStack() as patches:
        patches.enter_context(mock.patch.dict(RECIPES, rd=recipe))
        if variant.pooled:
            patches.enter_context(mock.patch.object(BlockExperts, "statistics", shared))
        for constant in variant.constants:
            patches.enter_context(mock.patch.object(*constant))
        yield


def measure(model: Model, original: Original, folder: Path, bits: float, label: str) -> Record:
    """Convert, replace the experts, and compare."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as work, changed(label):
        path = qmoe_format.convert(
            folder,
            Path(work) / "model.qmoe",
            recipe="rd",
            bits_per_weight=bits,
            calibration=Calibration(CALIBRATION_TEXT, samples=SAMPLES),
            **dict(VARIANTS[label].options),
        )
        load_experts(model, path)
        with qmoe_format.open(path, memory_map=False) as file:
            found = describe(file)["totals"]["experts"]["total_bits_per_weight"]
    seconds = round(time.perf_counter() - started, 1)
    return {"bits": found, "seconds": seconds, **original.compare()}


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="default: both")
    parser.add_argument("--bits", type=float, default=BITS, help=f"default: {BITS}")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="default: all")
    options = parser.parse_args()
    for name in options.model or MODELS:
        model = Model(DATA / name)
        original = Original(model, model.windows(read_text(EVALUATION_TEXT), WINDOWS))
        with tempfile.TemporaryDirectory() as surveys, surveys_shared(Path(surveys)):
            for label in options.only or VARIANTS:
                record = measure(model, original, DATA / name, options.bits, label)
                store(name, options.bits, label, record)


def store(model: str, bits: float, label: str, record: Record) -> None:
    """Add to the results, to which another process may be adding as well."""
    saved = report.load("convert_choices")
    settings = {"bits": bits, "samples": SAMPLES, "windows": WINDOWS}
    models = saved["models"] if saved.get("settings") == settings else {}
    models.setdefault(model, {})[label] = record
    report.save("convert_choices", {"settings": settings, "models": models})
    default = models[model].get(DEFAULT, record)
    print(
        f"{model}, {label}: {record['bits']:.3f} bits, KL {1e3 * record['kl']:.4f}e-3, "
        f"{record['kl'] / default['kl']:.3f} of the default's; loss gap "
        f"{1e3 * record['loss_gap']:+.3f}e-3 ± {1e3 * record['loss_gap_error']:.3f}e-3",
        flush=True,
    )


if __name__ == "__main__":
    main()
