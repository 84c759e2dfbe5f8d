"""What ``inspect`` shows to people."""

from __future__ import annotations

from collections.abc import Sequence

from qmoe_format.cli.text import count, size, table
from qmoe_format.inspection import PartReport, Report, TensorReport

HEADER = ("tensor", "encoding", "type", "shape", "size", "bits/weight", "zeros")


def tensor_table(description: Report, *, compressed_only: bool = False) -> list[str]:
    """Lines with a row for each tensor: the ternary ones, then the others."""
    tensors = sorted(description["tensors"], key=lambda each: each["encoding"] != "ternary-dict")
    if compressed_only:
        tensors = [tensor for tensor in tensors if tensor["encoding"] == "ternary-dict"]
    return table(HEADER, [_row(tensor) for tensor in tensors], left=4)


def _row(tensor: TensorReport) -> Sequence[str]:
    bits, zeros = tensor["total_bits_per_weight"], tensor["zero_fraction"]
    return (
        tensor["name"],
        tensor["encoding"],
        tensor["dtype"],
        " × ".join(map(str, tensor["shape"])) or "scalar",
        size(tensor["bytes"]),
        "" if bits is None else f"{bits:.3f}",
        "" if zeros is None else f"{zeros:.1%}",
    )


def summary(description: Report) -> list[str]:
    """Lines that say how small experts and file are, and what that is against bfloat16."""
    totals = description["totals"]
    parts: list[tuple[str, PartReport]] = [
        ("experts", totals["experts"]),
        ("everything else", totals["others"]),
        ("whole file", totals["file"]),
    ]
    rows = []
    for label, part in parts:
        ratio, bits = part["ratio"], part["total_bits_per_weight"]
        rows.append(
            (
                label,
                count(part["weights"]),
                size(part["bf16_bytes"]),
                size(part["bytes"]),
                "" if ratio is None else f"{ratio:.2f}×",
                "" if bits is None else f"{bits:.3f}",
            )
        )
    return table(("", "weights", "in bf16", "stored", "smaller", "bits/weight"), rows, left=1)
