"""Rate and distortion of the recipes on the two small trained models.

    python -m benchmarks.quantize [--model MODEL ...] [--windows N] [--quick] [--resume]

Writes benchmarks/results/quantize.json, after each measured file, and quantize.png; with --quick or
--windows nothing. Each model is converted by ``rtn`` and ``qmoe``, which have one size, and by
``rd``, with the same calibration text, at several sizes and at that of ``qmoe``; by ``qmoe`` and by
``rd`` at its size also with few sequences. ``evaluation`` says what is measured. Bits are total
bits of the expert weights in the file, including dictionaries, scales and lengths.

For ``rd``, only the seconds at qmoe's size are those of a whole conversion: later files of a model
reuse its survey.

"At the baseline's bits" and "bits at the baseline's error" are relative to ``qmoe`` and
interpolated between the sizes of ``rd``, one of which is within 2 % of the baseline's; the
logarithm of the error is taken to be linear in the bits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import qmoe_format
from benchmarks import report
from benchmarks.evaluation import Evaluation
from benchmarks.report import DATA
from qmoe_format.calibration.text import text_sha256
from qmoe_format.container.inspection import describe
from qmoe_format.conversion import Calibration
from qmoe_format.conversion.passes import BlockPasses
from qmoe_format.errors import QMoEError
from qmoe_format.quantize import Recipe

MODELS = ("switch-mini", "mixtral-mini")
CALIBRATION_TEXT = DATA / "text" / "calibration.jsonl"
BASELINE, BASELINE_FEW, OURS, OURS_FEW = "qmoe", "qmoe, few", "rd at qmoe's", "rd, few"

Record = dict[str, Any]
Records = dict[str, Record]
Curve = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Settings:
    """``windows`` of the evaluation text, ``samples`` of the calibration text; None for all."""

    bits: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0, 1.4)
    few: int = 40
    windows: int | None = None
    samples: int | None = None

    @property
    def partial(self) -> bool:
        """Whether this is only a trial run."""
        return self.windows is not None or self.samples is not None


QUICK = Settings(bits=(0.6, 1.0), few=8, windows=24, samples=24)


@dataclass(frozen=True, slots=True)
class Job:
    """A file to make; ``bits`` may be the label of another job, whose size to match."""

    label: str
    recipe: str
    samples: int | None = None
    bits: float | str | None = None
    masked: bool = False


def jobs(settings: Settings) -> list[Job]:
    samples, few = settings.samples, settings.few
    return [
        Job("rtn", "rtn"),
        Job(BASELINE, "qmoe", samples),
        Job(OURS, "rd", samples, BASELINE),
        Job(BASELINE_FEW, "qmoe", few),
        Job(OURS_FEW, "rd", few, BASELINE_FEW),
        Job("qmoe, special tokens masked", "qmoe", samples, masked=True),
        *(Job(f"rd {bits:g}", "rd", samples, bits) for bits in settings.bits),
    ]


# Files


class Stopwatch:
    """Seconds in which at least one thread is inside."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = 0
        self._since = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self.seconds += time.perf_counter() - self._since


@contextmanager
def quantizer_timed() -> Iterator[Stopwatch]:
    """Measure how long recipes are at work, whoever calls them."""
    watch, quantize = Stopwatch(), Recipe.quantize

    def timed(*arguments: Any, **named: Any) -> Any:
        with watch.running():
            return quantize(*arguments, **named)

    with mock.patch.object(Recipe, "quantize", timed):
        yield watch


@contextmanager
def surveys_shared(folder: Path) -> Iterator[None]:
    """Survey a model and a text only once: the survey does not depend on the size asked for."""
    survey = BlockPasses.survey
    others = shutil.ignore_patterns("lock", "state.json", "*.rows")

    def shared(self: BlockPasses) -> Any:
        asked = self.work.load("state") | {"bits_per_weight": None}
        kept = folder / hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        kept.mkdir(exist_ok=True)
        shutil.copytree(kept, self.work.folder, dirs_exist_ok=True)
        found = survey(self)
        shutil.copytree(self.work.folder, kept, ignore=others, dirs_exist_ok=True)
        return found

    with mock.patch.object(BlockPasses, "survey", shared):
        yield


def convert(model: str, job: Job, asked: float | None, path: Path) -> Record:
    """Make a file; return its size and the time it took."""
    calibration = Calibration(CALIBRATION_TEXT, samples=job.samples, mask_special_tokens=job.masked)
    started = time.perf_counter()
    with quantizer_timed() as quantizer:
        qmoe_format.convert(
            DATA / model,
            path,
            recipe=job.recipe,
            calibration=None if job.recipe == "rtn" else calibration,
            bits_per_weight=asked,
        )
    seconds = time.perf_counter() - started
    with qmoe_format.open(path, memory_map=False) as file:
        experts = describe(file)["totals"]["experts"]
    return {
        "recipe": job.recipe,
        "samples": job.samples,
        "asked_bits": asked,
        "bits": experts["total_bits_per_weight"],
        "payload_bits": experts["payload_bits_per_weight"],
        "zero_fraction": experts["zero_fraction"],
        "seconds": round(seconds, 1),
        "quantizer_seconds": round(quantizer.seconds, 1),
    }


def measure(model: str, job: Job, records: Records, evaluation: Evaluation) -> Record:
    """Make a file, measure it, delete it. A refusal of the converter is a result, too."""
    asked = job.bits
    if isinstance(asked, str):
        asked = records[asked].get("bits")
        if asked is None:
            return {"failed": f"the file {job.bits!r}, whose size to match, is missing"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{model}.qmoe"
        try:
            record = convert(model, job, asked, path)
        except QMoEError as error:
            return {"failed": str(error)}
        return {**record, **evaluation.measure(path)}


# Comparisons


def rated(records: Records, settings: Settings) -> list[Record]:
    """The files by ``rd`` with all the calibration text."""
    labels = [job.label for job in jobs(settings) if job.recipe == "rd" and job.label != OURS_FEW]
    return [records[label] for label in labels if "bits" in records.get(label, {})]


def curve(records: Records, settings: Settings, what: str) -> Curve:
    """(bits, error) of ``rated``, by size."""
    points = [(record["bits"], value_of(record, what)) for record in rated(records, settings)]
    return sorted((bits, value) for bits, value in points if value is not None and value > 0)


def value_of(record: Record, what: str) -> float | None:
    value: float | None = record.get(what)
    if what == "output_error" and record.get(what):
        value = record[what]["geometric_mean"]
    return value


def error_at(points: Curve, bits: float) -> float | None:
    """The error of a curve at some bits; None outside its range."""
    for (least, first), (most, last) in itertools.pairwise(points):
        if least <= bits <= most and least < most:
            share = (bits - least) / (most - least)
            return math.exp((1 - share) * math.log(first) + share * math.log(last))
    return None


def bits_at(points: Curve, error: float) -> float | None:
    """The fewest bits at which a curve is as good; its fewest of all if it is better everywhere."""
    if not points or points[-1][1] > error:
        return None
    better = next(place for place, (_, value) in enumerate(points) if value <= error)
    if better == 0:
        return points[0][0]
    (least, first), (most, last) = points[better - 1 : better + 1]
    share = math.log(first / error) / math.log(first / last)
    return least + share * (most - least)


def compare(records: Records, settings: Settings) -> dict[str, Any]:
    """``rd`` relative to the baseline; None where there is no answer."""
    baseline = records.get(BASELINE, {})
    found: dict[str, Any] = {}
    for what in ("output_error", "kl", "loss_gap"):
        points = curve(records, settings, what)
        aim = value_of(baseline, what)
        # A gap within its own error is no basis for a comparison.
        if aim is None or aim <= 2 * baseline.get(f"{what}_error", 0):
            found[what] = {"at the baseline's bits": None, "bits": None, "bits are at most": None}
            continue
        ours, bits = error_at(points, baseline["bits"]), bits_at(points, aim)
        found[what] = {
            "at the baseline's bits": None if ours is None else ours / aim,
            "bits": None if bits is None else bits / baseline["bits"],
            "bits are at most": bits == points[0][0] if bits is not None else None,
        }
    kl, kl_baseline = (records.get(label, {}).get("kl") for label in (OURS_FEW, BASELINE_FEW))
    found["few sequences: kl"] = kl / kl_baseline if kl and kl_baseline else None
    misses = [
        abs(record["bits"] / record["asked_bits"] - 1)
        for record in records.values()
        if record.get("asked_bits")
    ]
    found["bits off by"] = max(misses, default=None)
    for what in ("seconds", "quantizer_seconds"):
        found[what] = records.get(OURS, {}).get(what)
    return found


def checks(model: str, records: Records, compared: dict[str, Any]) -> list[dict[str, Any]]:
    """The project's targets and their results."""
    listed = []

    def check(what: str, value: float | None, most: float, least: float = -math.inf) -> None:
        reached = value is not None and least <= value <= most
        listed.append({"what": what, "value": value, "most": most, "reached": reached})
        if least > -math.inf:
            listed[-1]["least"] = least

    baseline = records.get(BASELINE, {})
    if model == "switch-mini":
        check("zeros of the baseline", baseline.get("zero_fraction"), 0.875, 0.855)
        check("loss gap of the baseline", baseline.get("loss_gap"), 0.0006, -0.0006)
    ratio = "at the baseline's bits"
    check("output error at the baseline's bits", compared["output_error"][ratio], 0.60)
    check("bits at the baseline's output error", compared["output_error"]["bits"], 0.60)
    check("KL at the baseline's bits", compared["kl"][ratio], 0.60)
    if model == "switch-mini":
        check("bits at the baseline's KL", compared["kl"]["bits"], 0.82)
    else:
        check("loss gap at the baseline's bits", compared["loss_gap"][ratio], 0.60)
    check("few sequences: KL at the baseline's bits", compared["few sequences: kl"], 1.0)
    check("bits asked for against bits in the file, off by", compared["bits off by"], 0.02)
    if model == "switch-mini":
        check("seconds of a conversion", compared["seconds"], 600)
    failed = [label for label, record in records.items() if "failed" in record]
    check("files that could not be made", len(failed), 0)
    return listed


# Output


def print_checks(model: str, listed: Sequence[dict[str, Any]]) -> None:
    for entry in listed:
        value = "no answer" if entry["value"] is None else f"{entry['value']:.4g}"
        between = f"{entry['least']:g} to " if "least" in entry else "at most "
        verdict = "reached" if entry["reached"] else "MISSED"
        print(f"{verdict:8} {model}: {entry['what']}: {value} ({between}{entry['most']:g})")


def plot(models: dict[str, Any], settings: Settings, path: Path) -> None:
    """KL, loss gap and output error against total bits, a row of panels for each model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = {
        "kl": "KL(bf16 ‖ quantized), nats/token",
        "loss_gap": "loss gap to bf16, nats/token",
        "output_error": "relative output error",
    }
    figure, axes = pyplot.subplots(
        len(models), len(panels), figsize=(11.5, 3.5 * len(models)), squeeze=False
    )
    for row, (model, kept) in zip(axes, models.items(), strict=True):
        records = kept["files"]
        series = {
            ("rd (ours)", "C0o-"): sorted(rated(records, settings), key=lambda each: each["bits"]),
            ("qmoe", "C3s"): [each for each in [records.get(BASELINE)] if each],
            ("rtn", "k^"): [each for each in [records.get("rtn")] if each],
        }
        for panel, (what, axis) in zip(row, panels.items(), strict=True):
            for (label, style), files in series.items():
                chosen = [each for each in files if value_of(each, what) is not None]
                panel.errorbar(
                    [each["bits"] for each in chosen],
                    [value_of(each, what) for each in chosen],
                    [each.get(f"{what}_error", 0) for each in chosen],
                    fmt=style,
                    markersize=4,
                    label=label,
                )
            panel.set(xlabel="total bits per weight", ylabel=axis, title=model)
            if what == "loss_gap":  # some gaps are zero or negative
                panel.set_yscale("symlog", linthresh=1e-3)
            else:
                panel.set_yscale("log")
            panel.grid(alpha=0.3, which="both")
            panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# The run


def kept_results(settings: dict[str, Any], models: Sequence[str], resume: bool) -> dict[str, Any]:
    """Results of earlier runs with the same settings; those of ``models`` only if ``resume``."""
    saved = report.load("quantize")
    if saved.get("settings") != settings:
        if saved and resume:
            raise SystemExit("quantize.json has other settings; leave out --resume to start over")
        return {}
    return {name: kept for name, kept in saved["models"].items() if resume or name not in models}


def run(models: Sequence[str], settings: Settings, resume: bool, save: bool) -> None:
    stated = {**asdict(settings), "bits": list(settings.bits)}
    stated["calibration_sha256"] = text_sha256(CALIBRATION_TEXT)
    results = kept_results(stated, models, resume) if save else {}
    for model in models:
        results.setdefault(model, {"files": {}})
    results = {model: results[model] for model in MODELS if model in results}

    def save_now() -> None:
        if save:
            report.save("quantize", {"settings": stated, "models": results})

    with tempfile.TemporaryDirectory() as folder, surveys_shared(Path(folder)):
        for model in models:
            measure_model(model, settings, results[model], save_now)
    if save:
        plot(results, settings, report.RESULTS / "quantize.png")
    for model in models:
        print_checks(model, results[model]["checks"])


def measure_model(
    model: str, settings: Settings, result: Record, save_now: Callable[[], None]
) -> None:
    """Measure the files that ``result`` lacks, and save after each."""
    records: Records = result["files"]
    evaluation = None
    for job in jobs(settings):
        if "bits" not in records.get(job.label, {}):
            if evaluation is None:
                started = time.perf_counter()
                evaluation = Evaluation(model, settings.windows)
                result["windows"] = evaluation.windows
                result["cross_entropy"] = evaluation.cross_entropy
                result["cross_entropy_error"] = evaluation.cross_entropy_error
                print(
                    f"{model}, bf16: {evaluation.cross_entropy:.4f} "
                    f"±{evaluation.cross_entropy_error:.4f}, {evaluation.windows} windows, "
                    f"{time.perf_counter() - started:.0f} s",
                    flush=True,
                )
            records[job.label] = measure(model, job, records, evaluation)
            save_now()
        print(f"{job.label}: {json.dumps(records[job.label])}", flush=True)
    result["compared"] = compare(records, settings)
    result["checks"] = checks(model, records, result["compared"])
    save_now()


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: both")
    parser.add_argument("--windows", type=int, help="of the evaluation text (default: all)")
    parser.add_argument("--quick", action="store_true", help="little text, two sizes, no results")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    options = parser.parse_args()
    settings = QUICK if options.quick else Settings()
    if options.windows:
        settings = replace(settings, windows=options.windows)
    run(options.model or MODELS, settings, options.resume, save=not settings.partial)


if __name__ == "__main__":
    main()
