"""What ``benchmarks.gpu`` makes of its times: ratios, the table of targets, a plot. No GPU needed.

A *work* is one way to do one call on one shape:

    call    one N (one matrix, N tokens), fused N (8 experts, N tokens each), decode 0
    family  ours, bf16 or anchor;  way: which of several, such as a function of torch
    zeros   share of zero trits; None for bf16
    bytes   that have to move: stored matrices, x and y (decode: the output);  weights: used
    graph, plain    seconds of a call in a CUDA graph, and launched one by one: median, least, most
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report

Record = dict[str, Any]
Shape = tuple[int, int]  # rows, columns

_PAPER = ((768, 3072), (1024, 4096), (2080, 6144))
_TODAY = ((2048, 768), (2048, 1408), (4096, 1536), (7168, 2048), (4096, 14336))
SHAPES: tuple[Shape, ...] = tuple(
    shape for rows, columns in (*_PAPER, *_TODAY) for shape in ((rows, columns), (columns, rows))
)
ZEROS = (0.60, 0.885, 0.95)


def best(works: Sequence[Record], call: str, family: str, zeros: float | None) -> Record | None:
    """The work of the least median in a graph."""
    found = [w for w in works if (w["call"], w["family"], w["zeros"]) == (call, family, zeros)]
    return min(found, key=lambda work: work["graph"]["median"], default=None)


def compare(works: Sequence[Record], bandwidth: dict[str, float]) -> list[Record]:
    """One record a call and share of zeros: ours against the best of the others."""
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


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None


def summary(shapes: Sequence[Record]) -> Record:
    """The figures that have targets; None where the shapes for them were not measured."""

    def values(call: str, key: str, chosen: Sequence[Shape] | None = None) -> list[float]:
        return [
            record[key]
            for shape in shapes
            if chosen is None or (shape["rows"], shape["columns"]) in chosen
            for record in shape["compared"]
            if record["call"] == call and key in record and (not chosen or record["zeros"] == 0.885)
        ]

    large, experts = [(4096, 14336), (14336, 4096)], [(4096, 1536), (2080, 6144)]
    return {
        "one 1, 4096x14336 and transpose, zeros .885: to bf16": values(
            "one 1", "bf16_graph", large
        ),
        "fused 1, 4096x1536 and 2080x6144, zeros .885: to bf16": values(
            "fused 1", "bf16_graph", experts
        ),
        "one 1, all: to the anchor, geometric mean": geometric_mean(
            values("one 1", "anchor_graph")
        ),
        "one 1, all: to bf16, geometric mean": geometric_mean(values("one 1", "bf16_graph")),
        "one 1, all: to bf16, least": min(values("one 1", "bf16_graph"), default=None),
        "decode, all: of write bandwidth, least": min(
            values("decode 0", "of_bandwidth"), default=None
        ),
        "decode, 4096x14336 and transpose, zeros .885: of write bandwidth": values(
            "decode 0", "of_bandwidth", large
        ),
        "fused 16, all: to bf16, least": min(values("fused 16", "bf16_graph"), default=None),
        "fused 16, all: to bf16, geometric mean": geometric_mean(values("fused 16", "bf16_graph")),
        "one 16, all: to bf16, least": min(values("one 16", "bf16_graph"), default=None),
    }


def lines(shape: Record) -> str:
    """A table of one shape for the terminal."""
    head = "call       zeros      us  to bf16  plain  to anchor  of bandwidth  Gweights/s"
    text = [f"{shape['rows']} x {shape['columns']}", head]
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
    """The shapes that a run with the same settings on the same device has measured before."""
    path = folder / "gpu.json"
    if not path.exists():
        return []
    saved = json.loads(path.read_text())
    if (saved["settings"], saved["device"]) != (settings, device):
        raise SystemExit(f"{path} is of other settings or another device: leave out --resume")
    shapes: list[Record] = saved["shapes"]
    return shapes


def save(folder: Path, settings: Record, device: Record, bandwidth: Record, shapes: Any) -> None:
    """Write everything so far, so that a stopped run can go on."""
    figures = {
        "device": device,
        "settings": settings,
        "bandwidth": bandwidth,
        "summary": summary(shapes),
        "shapes": shapes,
    }
    report.save("gpu", figures, folder)


def plot(shapes: Sequence[Record], path: Path) -> None:
    """One matrix and one token, against bf16 and the anchor; and the fused call against bf16."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(3, 1, figsize=(9, 10), sharex=True)
    names = [f"{shape['rows']}×{shape['columns']}" for shape in shapes]
    all_zeros = sorted({r["zeros"] for shape in shapes for r in shape["compared"]})
    drawn = [
        ("one matrix, one token: bf16 / ours", "bf16_graph", [("one 1", z) for z in all_zeros]),
        ("one matrix, one token: anchor / ours", "anchor_graph", [("one 1", z) for z in all_zeros]),
        (
            "8 experts in one launch, zeros .885: bf16 / ours",
            "bf16_graph",
            [(f"fused {tokens}", 0.885) for tokens in (1, 4, 16)],
        ),
    ]
    for panel, (title, key, series) in zip(panels, drawn, strict=True):
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
