"""What our recipes lose beside llama.cpp's types, on the same weights and the same text.

    python -m benchmarks.quality [--model MODEL ...] [--only LABEL ...] [--windows N]
                                 [--calibration FILE] [--evaluation FILE] [--quick] [--resume]

Writes benchmarks/results/quality.json, after each recipe or type, and quality.png; with --quick
nothing. By default MODEL is both small trained models; it may be the folder of any checkpoint.
LABEL is a recipe or type as in the table, or a pattern such as 'rd *'; results of others are kept.
With --resume only what is missing is measured.

Only the experts' matrices are replaced. Ours are converted with all of the calibration text, theirs
quantized by llama.cpp's own code with an importance matrix of the same sequences, see
``gguf_types``. ``evaluation`` says what is measured. Bits are per weight of the experts, with all
scales and dictionaries. KL is also measured on text of other kinds than the calibration's:

    code      every tenth module at the top of Python's standard library, by name
    licenses  of packages that this one needs, each paragraph once
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

import qmoe_format
from benchmarks import report
from benchmarks.evaluation import (
    CALIBRATION_TEXT,
    EVALUATION_TEXT,
    MODELS,
    Evaluation,
    Model,
    Original,
    load_experts,
    read_text,
    surveys_shared,
)
from benchmarks.gguf_types import TYPES, GGUFExperts
from benchmarks.report import DATA
from qmoe_format.calibration.text import Chat
from qmoe_format.cli.progress_line import ProgressLine
from qmoe_format.container.inspection import describe
from qmoe_format.conversion import Calibration
from qmoe_format.errors import QMoEError
from qmoe_format.progress import Progress
from qmoe_format.quantize import RECIPES

Record = dict[str, Any]
Records = dict[str, Record]

# The arguments of ``convert`` and of ``Calibration``.
FEW = {"samples": 40}
OURS: Records = {
    **{
        f"rd {bits:g}": {"recipe": "rd", "bits_per_weight": bits}
        for bits in (0.3, 0.6, 0.8, 1.0, 1.4, 2.0, 3.0)
    },
    "rd 1, few": {"recipe": "rd", "bits_per_weight": 1.0, **FEW},
    "qmoe": {"recipe": "qmoe"},
    "qmoe, few": {"recipe": "qmoe", **FEW},
    "qmoe, masked": {"recipe": "qmoe", "mask_special_tokens": True},
    "rtn": {"recipe": "rtn"},
    **{f"gptq {bits}": {"recipe": "gptq", "bits": bits} for bits in (2, 3, 4)},
    **{f"moqe {bits}": {"recipe": "moqe", "bits": bits} for bits in (2, 3, 4)},
    "finequant": {"recipe": "finequant"},
    "int4-experts": {"recipe": "int4-experts"},
}
QUICK = ("rd 1", "qmoe", "rtn", "IQ1_S", "TQ1_0", "IQ2_XXS", "IQ2_S", "Q4_K")
MAIN_TEXT = "evaluation"
OTHER_TEXTS = ("code", "licenses")
LICENSED = ("numpy", "numba", "zstandard", "torch", "transformers", "safetensors", "tokenizers")

# Windows to evaluate on, and sequences to calibrate with; None for all.
Settings = dict[str, int | None]
FULL: Settings = {"windows": 136, "other_windows": 64, "samples": None}
TRIAL: Settings = {"windows": 24, "other_windows": 16, "samples": 24}

Documents = list[str | Chat]


def code() -> Documents:
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    return [module.read_text(encoding="utf-8") for module in modules[::10]]


def licenses() -> Documents:
    paragraphs: dict[str, None] = {}
    for package in LICENSED:
        for file in sorted(importlib.metadata.files(package) or []):
            if "licen" in file.name.lower() and file.suffix != ".py":
                paragraphs |= dict.fromkeys(file.read_text(encoding="utf-8").split("\n\n"))
    return ["\n\n".join(paragraphs)]


class Subject:
    """A model, what its original says about the texts, and the ways to replace its experts."""

    def __init__(
        self,
        folder: Path,
        calibration: Path,
        texts: dict[str, Documents],
        settings: Settings,
        *,
        theirs: bool,
    ) -> None:
        """``theirs``: whether GGUF's types will be asked for."""
        self._folder, self._model = folder, Model(folder)
        self._calibration = Calibration(calibration, samples=settings["samples"])
        main, count = texts[MAIN_TEXT], settings["other_windows"]
        self._main = Evaluation(self._model, self._model.windows(main, settings["windows"]))
        self._others = {
            name: Original(self._model, self._model.windows(texts[name], count))
            for name in OTHER_TEXTS
        }
        if theirs:
            sequences = self._model.batches(read_text(calibration), samples=settings["samples"])
            with ProgressLine("importance matrix", "batches") as line:
                self._theirs = GGUFExperts(self._model, self._main.original, sequences, line)

    def bf16(self) -> Record:
        return {
            name: {
                "windows": len(original.windows),
                "cross_entropy": original.cross_entropy,
                "cross_entropy_error": original.cross_entropy_error,
            }
            for name, original in {MAIN_TEXT: self._main.text, **self._others}.items()
        }

    def measure(self, label: str) -> Record:
        """Replace the experts and measure. A refusal is a result, too."""
        started = time.perf_counter()
        record: Record = {"options": options_of(label)}
        try:
            with ProgressLine(label, "weights" if label in OURS else "matrices") as line:
                replace = self._convert if label in OURS else self._theirs.replace
                record["bits"] = replace(label, line)
        except QMoEError as error:
            return {**record, "failed": str(error)}
        record["seconds"] = round(time.perf_counter() - started, 1)
        with ProgressLine(f"{label}, {MAIN_TEXT}", "windows") as line:
            record |= self._main.measure(line)
        for name, original in self._others.items():
            with ProgressLine(f"{label}, {name}", "windows") as line:
                found = original.compare(line)
            record[name] = {what: found[what] for what in ("kl", "kl_error")}
        return record

    def _convert(self, label: str, progress: Progress) -> float | None:
        fields = Calibration.__dataclass_fields__.keys() & OURS[label].keys()
        options = {name: value for name, value in OURS[label].items() if name not in fields}
        calibration = replace(self._calibration, **{name: OURS[label][name] for name in fields})
        calibrated = RECIPES[options["recipe"]].calibrated
        with tempfile.TemporaryDirectory() as work:
            path = qmoe_format.convert(
                self._folder,
                Path(work) / "model.qmoe",
                calibration=calibration if calibrated else None,
                progress=progress,
                **options,
            )
            load_experts(self._model, path)
            with qmoe_format.open(path, memory_map=False) as file:
                return describe(file)["totals"]["experts"]["total_bits_per_weight"]


# The run


def labels(patterns: Sequence[str]) -> list[str]:
    """The recipes and types that match one of the patterns."""
    known = [*OURS, *TYPES]
    for pattern in patterns:
        if not any(fnmatchcase(label, pattern) for label in known):
            raise SystemExit(f"there is no {pattern!r}, only {', '.join(known)}")
    return [label for label in known if any(fnmatchcase(label, each) for each in patterns)]


def options_of(label: str) -> Record:
    return OURS.get(label, {"type": label})


def run(
    folders: Sequence[Path],
    chosen: Sequence[str],
    calibration: Path,
    evaluation: Path,
    settings: Settings,
    *,
    resume: bool,
    save: bool,
) -> None:
    texts = {MAIN_TEXT: read_text(evaluation), "code": code(), "licenses": licenses()}
    stated: Record = dict(settings)
    for name, text in {"calibration": read_text(calibration), **texts}.items():
        stated[f"{name}_sha256"] = hashlib.sha256(json.dumps(text).encode()).hexdigest()
    for folder in folders:
        before: Record = report.load("quality").get("models", {}).get(folder.name, {})
        kept: Records = before["records"] if save and before.get("settings") == stated else {}
        if save and resume and before.get("settings") not in (None, stated):
            raise SystemExit(f"{folder.name} was measured with other text or other settings")
        missing = [
            label
            for label in chosen
            if not (resume and "bits" in kept.get(label, {}))
            or kept[label]["options"] != options_of(label)
        ]
        if missing:
            theirs = not set(missing) <= set(OURS)
            subject = Subject(folder, calibration, texts, settings, theirs=theirs)
            result = {"settings": stated, "bf16": subject.bf16(), "records": {}}
        for label in missing:
            kept[label] = result["records"][label] = subject.measure(label)
            if save:
                store(folder.name, result)
        print(f"\n{folder.name}\n{table(kept)}", flush=True)
    if save:
        plot(report.load("quality")["models"], report.RESULTS / "quality.png")


def store(model: str, result: Record) -> None:
    """Add to the results, to which others may be adding as well."""
    models: dict[str, Record] = report.load("quality").get("models", {})
    before = models.get(model, {})
    kept = before["records"] if before.get("settings") == result["settings"] else {}
    models[model] = {**result, "records": {**kept, **result["records"]}}
    machine = report.machine()
    for package in ("transformers", "gguf", "llama-cpp-python"):
        with suppress(importlib.metadata.PackageNotFoundError):
            machine["versions"][package] = importlib.metadata.version(package)
    report.save("quality", {"machine": machine, "models": models})


# Output


def table(records: Records) -> str:
    """In order of bits; KL and loss gap in thousandths of a nat."""
    lines = [
        f"{'':14}{'bits':>6}  {'KL':>14}  {'loss gap':>15}  {'same top 1':>14}"
        + "".join(f"  {'KL, ' + text:>14}" for text in OTHER_TEXTS)
    ]
    for label, each in sorted(records.items(), key=lambda item: item[1].get("bits", 99)):
        name = f"{label}{' *' if label in OURS else ''}"
        if "failed" in each:
            lines.append(f"{name:14}{each['failed']}")
            continue
        kl = [each, *(each[text] for text in OTHER_TEXTS)]
        cells = [f"{1e3 * one['kl']:.3f} ± {1e3 * one['kl_error']:.3f}" for one in kl]
        gap = f"{1e3 * each['loss_gap']:+.3f} ± {1e3 * each['loss_gap_error']:.3f}"
        top = f"{100 * each['top1']:.2f} ± {100 * each['top1_error']:.2f} %"
        lines.append(
            f"{name:14}{each['bits']:6.3f}  {cells[0]:>14}  {gap:>15}  {top:>14}"
            + "".join(f"  {cell:>14}" for cell in cells[1:])
        )
    return "\n".join([*lines, "* ours; KL and loss gap in thousandths of a nat"])


OURS_LINE, OURS_POINT, THEIRS = (
    "rd (ours), asked for several sizes",
    "our other recipes",
    "GGUF types",
)
STYLES = {OURS_LINE: "C0o-", OURS_POINT: "C3s", THEIRS: "C2D"}
# Which corner of a label is near its point; for ours in reverse.
PLACES = [("left", "bottom"), ("left", "top"), ("right", "bottom"), ("right", "top")]


def plot(models: dict[str, Record], path: Path) -> None:
    """KL over bits, a panel for each model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(models), figsize=(5.2 * len(models), 5), squeeze=False, layout="constrained"
    )
    drawn: list[list[tuple[float, float, str, str]]] = []
    for panel, (model, result) in zip(axes[0], models.items(), strict=True):
        drawn.append([])
        for group, style in STYLES.items():
            points = sorted(
                (each["bits"], each["kl"], label.removeprefix("rd "), style[:2])
                for label, each in result["records"].items()
                if "bits" in each and _group(label) == group
            )
            drawn[-1] += points
            panel.plot(*[[each[i] for each in points] for i in (0, 1)], style, ms=5, label=group)
        panel.set(yscale="log", title=model, xlabel="bits per expert weight, everything included")
        panel.grid(alpha=0.3, which="both")
        panel.margins(x=0.1)
    axes[0][0].set_ylabel("KL(bf16 ‖ quantized), nats per token")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3 if len(models) > 1 else 1)
    figure.suptitle("Loss over size of the experts: lower left is better")
    figure.draw_without_rendering()
    for panel, points in zip(axes[0], drawn, strict=True):
        _label(panel, points)
    figure.savefig(path, dpi=110)


def _group(label: str) -> str | None:
    """What a point is drawn as; None for those calibrated otherwise."""
    if label not in OURS:
        return THEIRS
    if OURS[label].keys() & {"samples", "mask_special_tokens"}:
        return None
    return OURS_LINE if label.startswith("rd ") else OURS_POINT


def _label(panel: Any, points: list[tuple[float, float, str, str]]) -> None:
    """Write each label where it hides no point and no other label, if there is such a place."""
    from matplotlib.transforms import Bbox

    centers = panel.transData.transform([point[:2] for point in points])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centers]
    for x, y, text, color in points:
        places = PLACES[::-1] if color == "C0" else PLACES
        for distance, (side, edge) in itertools.product((4, 12, 20), places):
            offset = (distance if side == "left" else -distance, 3 if edge == "bottom" else -3)
            note = panel.annotate(
                text, (x, y), offset, textcoords="offset points",
                ha=side, va=edge, fontsize=8, color=color,
            )  # fmt: skip
            box = note.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            note.remove()
        else:
            continue
        taken.append(box)


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument(
        "--model",
        action="append",
        help="small trained model or folder of a checkpoint (default: both)",
    )
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="recipes and types to measure")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION_TEXT, help="file of text")
    parser.add_argument("--evaluation", type=Path, default=EVALUATION_TEXT, help="file of text")
    parser.add_argument("--windows", type=int, help="of the evaluation text (default: 136)")
    parser.add_argument("--quick", action="store_true", help="few recipes, little text, no results")
    parser.add_argument("--resume", action="store_true", help="measure only what is missing")
    options = parser.parse_args()
    if not sys.stderr.isatty():
        disable_progress_bar()
    settings = TRIAL if options.quick else FULL
    if options.windows:
        settings = {**settings, "windows": options.windows}
    folders = [DATA / each if each in MODELS else Path(each) for each in options.model or MODELS]
    with tempfile.TemporaryDirectory() as surveys, surveys_shared(Path(surveys)):
        run(
            [folder.resolve() for folder in folders],
            labels(options.only or (QUICK if options.quick else ["*"])),
            options.calibration,
            options.evaluation,
            settings,
            resume=options.resume,
            save=not options.quick,
        )


if __name__ == "__main__":
    main()
