"""The predictions of ``benchmarks.gpu_model``: counting a listing, and adding up."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import gpu_model, report
from benchmarks.gpu_model import Parts
from tests.gpu import run_reference
from tests.gpu.problems import random_levels

LOADS = ["LDS R1, [R2] ;"]
# Two instructions, and a branch around one; a group's three; the walk; the tail, with a way around
# eight codes; the group's last two.
BLOCKS = {
    ".L_x_0": ["MOV R1, R2 ;", "@P0 BRA `(.L_x_1) ;", "MOV R1, R3 ;"],
    ".L_x_1": ["@!P1 EXIT ;", "BAR.SYNC.DEFER_BLOCKING 0x0 ;"],
    ".L_x_2": ["IADD3 R1, R1, R2, R3 ;"],
    ".L_x_3": [*LOADS * 32, "@P1 BRA `(.L_x_3) ;"],
    ".L_x_4": ["@P0 BRA P2, `(.L_x_5) ;", *LOADS * 8],
    ".L_x_5": [*LOADS, "BRA.DIV UR4, `(.L_x_7) ;", "STG.E [R2], R1 ;", "@P0 BRA `(.L_x_2) ;"],
    ".L_x_6": ["EXIT ;"],
    ".L_x_7": ["WARPSYNC ;", "BRA `(.L_x_6) ;"],
}


def listing() -> str:
    lines, at = [], 0
    for label, instructions in BLOCKS.items():
        lines.append(f"{label}:")
        for text in instructions:
            lines.append(f"        /*{at:04x}*/                   {text}")
            at += 16
    return "\n".join(lines)


def test_the_parts_of_a_listing() -> None:
    assert gpu_model.count(listing()) == Parts(prologue=6, walk=33, group=5, tail=9)


@pytest.mark.parametrize(("rows", "columns", "zeros"), [(96, 1536, 0.6), (64, 2048, 0.95)])
def test_codes_are_those_of_random_levels(rows: int, columns: int, zeros: float) -> None:
    layout = gpu_model.layout_of(rows, columns, zeros)
    levels = random_levels(rows, columns, zeros, np.random.default_rng(0))
    offsets = run_reference.runs(levels[None], layout)["offsets"][0]
    mean = float(np.diff(offsets.astype(int))[:-1].mean())
    assert gpu_model.codes_of(layout, zeros) == pytest.approx(mean, rel=0.03)


def test_more_work_takes_longer() -> None:
    layout, parts = gpu_model.layout_of(4096, 14336, 0.885), Parts(300, 200, 100, 230)
    few, many = (gpu_model.predict(layout, parts, codes, 1)["H100"] for codes in (50, 100))
    assert 0 < few < many < 2 * few
    assert gpu_model.predict(layout, parts, 50, 8)["H100"] > 3 * few


def test_predictions_are_near_what_was_measured() -> None:
    ratio = report.load("gpu_model")["ratio"]
    assert 0.7 < ratio["least"] <= ratio["median"] <= ratio["most"] < 1.4
