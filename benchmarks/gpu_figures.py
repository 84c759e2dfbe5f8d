"""Figures from the timings of ``benchmarks.gpu``: ratios, targets, a plot. No GPU needed.

A *work* is one way to do one call on one shape:

    call    one N (one matrix, N tokens), fused N (8 experts, N tokens each), decode 0
    family  ours, bf16 or anchor;  way: which of several, such as a function of torch
    zeros   fraction of zero levels; None for bf16
    bytes   that have to be moved: stored matrices, x and y (decode: the output)
    weights that are used
    graph, plain    seconds per call in a CUDA graph, and launched one by one: median, least, most
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report

Record = dict[str, Any]
Shape = tuple[int, int]  # rows, columns

_SHAPES = (
    *((768, 3072), (1024, 4096), (2080, 6144)),  # of the QMoE paper
    *((2048, 768), (2048, 1408), (4096, 1536), (7168, 2048), (4096, 14336)),  # of today's models
)
SHAPES = tuple(shape for rows, columns in _SHAPES for shape in ((rows, columns), (columns, rows)))
ZEROS = (0.60, 0.885, 0.95)


def best(works: Sequence[Record], call: str, family: str, zeros: float | None) -> Record | None:
    """The work with the lowest median in a graph."""
    found = [w for w in works if (w["call"], w["family"], w["zeros"]) == (call, family, zeros)]
    return min(found, key=lambda work: work["graph"]["median"], default=None)


def compare(works: Sequence[Record], bandwidth: dict[str, float]) -> list[Record]:
    """One record per call and fraction of zeros: ours against the best of the others."""
    compared = []
    for call, zeros in dict.fromkeys((w["call"], w["zeros"]) for w in works):
        ours = best(works, call, "ours", zeros)
        if ours is None:
            continue
        seconds = ours["graph"]["median"]
        moving = "write" if call == "decode 0" else "read"
        record = {
            "call": call,
            "zeros": zeros,
            "microseconds": 1e6 * seconds,
            "weights_per_second": ours["weights"] / seconds,
            "of_bandwidth": ours["bytes"] / seconds / bandwidth[moving],
        }
        for family, other in (
            ("bf16", best(works, call, "bf16", None)),
            ("anchor", best(works, call, "anchor", zeros)),
        ):
            if other is not None:
                for launch in ("graph", "plain"):
                    ratio = other[launch]["median"] / ours[launch]["median"]
                    record[f"{family}_{launch}"] = ratio
                record[f"{family}_way"] = other["way"]
        compared.append(record)
    return compared


def summary(shapes: Sequence[Record]) -> Record:
    """The figures that have targets; None or nothing where their shapes were not measured."""

    def values(call: str, key: str, *chosen: Shape) -> list[float]:
        """Of all shapes and fractions of zeros, or of ``chosen`` shapes with 0.885."""
        return [
            record[key]
            for shape in shapes
            if not chosen or (shape["rows"], shape["columns"]) in chosen
            for record in shape["compared"]
            if record["call"] == call and key in record and (not chosen or record["zeros"] == 0.885)
        ]

    def least(call: str, key: str) -> float | None:
        return min(values(call, key), default=None)

    def mean(call: str, key: str) -> float | None:
        logarithms = [math.log(value) for value in values(call, key)]
        return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None

    bf16, large, experts = (
        "bf16_graph",
        [(4096, 14336), (14336, 4096)],
        [(4096, 1536), (2080, 6144)],
    )
    return {
        "one 1, 4096x14336 and transpose, zeros .885: to bf16": values("one 1", bf16, *large),
        "fused 1, 4096x1536 and 2080x6144, zeros .885: to bf16": values("fused 1", bf16, *experts),
        "one 1, all: to the anchor, geometric mean": mean("one 1", "anchor_graph"),
        "one 1, all: to bf16, geometric mean": mean("one 1", bf16),
        "one 1, all: to bf16, least": least("one 1", bf16),
        "decode, all: of write bandwidth, least": least("decode 0", "of_bandwidth"),
        "decode, 4096x14336 and transpose, zeros .885: of write bandwidth": values(
            "decode 0", "of_bandwidth", *large
        ),
        "fused 16, all: to bf16, least": least("fused 16", bf16),
        "fused 16, all: to bf16, geometric mean": mean("fused 16", bf16),
        "one 16, all: to bf16, least": least("one 16", bf16),
    }


def lines(shape: Record) -> str:
    """A table of one shape for the terminal."""
    columns = "call       zeros      us  to bf16  plain  to anchor  of bandwidth  Gweights/s"
    text = [f"{shape['rows']} x {shape['columns']}", columns]
    for record in shape["compared"]:
        ratios = "".join(
            f"{record[key]:{width}.2f}" if key in record else " " * width
            for key, width in (("bf16_graph", 9), ("bf16_plain", 7), ("anchor_graph", 11))
        )
        text.append(
            f"{record['call']:10}{record['zeros']:6.3f}{record['microseconds']:8.1f}{ratios}"
            f"{record['of_bandwidth']:14.1%}{record['weights_per_second'] / 1e9:12.0f}"
        )
    return "\n".join(text)


def kept(folder: Path, settings: Record, device: Record) -> list[Record]:
    """The shapes measured so far by a run with the same settings on the same device."""
    path = folder / "gpu.json"
    if not path.exists():
        return []
    saved = json.loads(path.read_text())
    if (saved["settings"], saved["device"]) != (settings, device):
        raise SystemExit(f"{path}: has other settings or another device; leave out --resume")
    shapes: list[Record] = saved["shapes"]
    return shapes


def save(folder: Path, settings: Record, device: Record, bandwidth: Record, shapes: Any) -> None:
    """Write the figures so far, so that an interrupted run can be resumed."""
    figures = {
        "device": device,
        "settings": settings,
        "bandwidth": bandwidth,
        "summary": summary(shapes),
        "shapes": shapes,
    }
    report.save("gpu", figures, folder)


def plot(shapes: Sequence[Record], path: Path) -> None:
    """Plot one matrix and one token against bf16 and the anchor, and fused calls against bf16."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(3, 1, figsize=(9, 10), sharex=True)
    names = [f"{shape['rows']}×{shape['columns']}" for shape in shapes]
    one = [("one 1", z) for z in sorted({r["zeros"] for s in shapes for r in s["compared"]})]
    fused = [(f"fused {tokens}", 0.885) for tokens in (1, 4, 16)]
    plots = [
        ("one matrix, one token: bf16 / ours", "bf16_graph", one),
        ("one matrix, one token: anchor / ours", "anchor_graph", one),
        ("8 experts in one launch, zeros .885: bf16 / ours", "bf16_graph", fused),
    ]
    for panel, (title, key, series) in zip(panels, plots, strict=True):
        for call, zeros in series:
            points = [
                (place, record[key])
                for place, shape in enumerate(shapes)
                for record in shape["compared"]
                if (record["call"], record["zeros"]) == (call, zeros) and key in record
            ]
            if points:
                label = f"zeros {zeros:g}" if call == "one 1" else f"{call.split()[1]} tokens each"
                panel.plot(*zip(*points, strict=True), "o", label=label)
        panel.axhline(1, color="k", linewidth=0.8)
        panel.set(title=title, ylabel="times as fast", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    panels[-1].set_xticks(range(len(names)), names, rotation=60, ha="right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
