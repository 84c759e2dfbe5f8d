"""The tables that ``inspect``, ``convert`` and ``demo`` print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qmoe_format.cli.formatting import count, size, table

if TYPE_CHECKING:
    from qmoe_format.container.inspection import PartReport, Report, TensorReport
    from qmoe_format.container.reader import QMoEFile
    from qmoe_format.conversion.report import Quality, StackQuality

HEADER = ("tensor", "encoding", "type", "shape", "size", "bits/weight", "zeros")


def tensor_table(description: Report, *, compressed_only: bool = False) -> list[str]:
    """Lines with a row for each tensor: the ternary ones, then the others."""
    tensors = sorted(description["tensors"], key=lambda each: each["zero_fraction"] is None)
    if compressed_only:
        tensors = [tensor for tensor in tensors if tensor["zero_fraction"] is not None]
    return table(HEADER, [_row(tensor) for tensor in tensors], left=4)


def _row(tensor: TensorReport) -> Sequence[str]:
    return (
        tensor["name"],
        tensor["encoding"],
        tensor["dtype"],
        " × ".join(map(str, tensor["shape"])) or "scalar",
        size(tensor["bytes"]),
        _optional("{:.3f}", tensor["total_bits_per_weight"]),
        _optional("{:.1%}", tensor["zero_fraction"]),
    )


def quality_tables(quality: Quality, file: QMoEFile) -> list[str]:
    """Lines with settings and totals, a row for each stack, and one for each fallback; then
    ``few_tokens_warning``."""
    settings, totals = quality["settings"], quality["totals"]
    target = settings.get("bits_per_weight")
    lambdas = [each["lambda"] for each in quality["stacks"] if each["lambda"] is not None]
    lines = [
        f"recipe {settings.get('recipe')}, text with SHA-256 {settings.get('text_sha256')}",
        f"{totals.get('total_bits_per_weight')} bits/weight"
        + (f", target {target}" if target else "")
        + (f", lambda {min(lambdas):.3g} to {max(lambdas):.3g}" if lambdas else ""),
        "",
    ]
    header = (
        "stack", "experts", "fallbacks", "tokens", "damping", "relative error", "bits/weight",
        "kurtosis", "levels", "zeros",
    )  # fmt: skip
    lines += table(header, [_quality_row(stack) for stack in quality["stacks"]], left=1)
    lines += ["", "minimum / mean / maximum over the experts of each stack"]
    fallbacks = [
        (stack["name"], str(number), count(expert["tokens"]), expert["fallback"])
        for stack in quality["stacks"]
        for number, expert in enumerate(stack["experts"])
        if expert["fallback"] is not None
    ]
    if fallbacks:
        lines += ["", *table(("stack", "expert", "tokens", "fallback"), fallbacks, left=1)]
    return lines + few_tokens_warning(quality, file)


def few_tokens_warning(quality: Quality, file: QMoEFile) -> list[str]:
    """After an empty line, one about the experts that saw few tokens; none if there are none."""
    from qmoe_format.conversion.report import few_tokens

    few = few_tokens(quality, {name: entry.shape[-1] for name, entry in file.tensors.items()})
    if not few:
        return []
    advice = "" if quality["settings"].get("all_experts") else ", or use --all-experts"
    return [
        "",
        f"{few.experts} of {few.of} experts saw fewer tokens than their matrices have columns (the "
        f"fewest: {few.fewest}); calibrate on more text{advice}",
    ]


def _quality_row(stack: StackQuality) -> Sequence[str]:
    experts = stack["experts"]
    return (
        stack["name"],
        str(len(experts)),
        str(sum(each["fallback"] is not None for each in experts)),
        _spread([each["tokens"] for each in experts], count),
        _spread([each["damping"] for each in experts], "{:.3g}".format),
        _spread([each["relative_error"] for each in experts], "{:.4f}".format),
        _spread([each["bits"] for each in experts], "{:.3f}".format),
        _mean([each["kurtosis"] for each in experts], "{:.1f}".format),
        _spread([each["levels"] for each in experts], "{:.0f}".format),
        _mean([100 * each["zeros"] for each in experts], "{:.0f} %".format),
    )


def _mean(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return text(sum(known) / len(known)) if known else ""


def _spread(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    """Minimum / mean / maximum of the values that there are."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return " / ".join(map(text, (min(known), sum(known) / len(known), max(known))))


def summary(description: Report) -> list[str]:
    """Lines with the sizes of experts and file, compared with bfloat16.

    If the checkpoint was in another type, they are compared with that, too.
    """
    totals = description["totals"]
    parts: list[tuple[str, PartReport]] = [
        ("experts", totals["experts"]),
        ("everything else", totals["others"]),
        ("whole file", totals["file"]),
    ]
    as_it_came = any(part["source_bytes"] != part["bf16_bytes"] for _, part in parts)
    rows = [
        (
            label,
            count(part["weights"]),
            size(part["bf16_bytes"]),
            *([size(part["source_bytes"])] if as_it_came else []),
            size(part["bytes"]),
            _optional("{:.2f}×", part["ratio"]),
            *([_optional("{:.2f}×", part["source_ratio"])] if as_it_came else []),
            _optional("{:.3f}", part["total_bits_per_weight"]),
        )
        for label, part in parts
    ]
    header: tuple[str, ...] = ("", "weights", "in bf16", "stored", "smaller", "bits/weight")
    if not as_it_came:
        return table(header, rows, left=1)
    compared = ("than bf16", "than it came")
    header = (*header[:3], "as it came", header[3], *compared, header[5])
    lines = table(header, rows, left=1)
    return [*lines, "", f"experts of the checkpoint as it came: {description['source_format']}"]


def _optional(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)
