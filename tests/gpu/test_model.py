"""``benchmarks.gpu_model``: counting listings and codes, and adding up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_clocks, gpu_codes, gpu_model, gpu_parts, report
from benchmarks.gpu_listing import Listing
from benchmarks.gpu_parts import Decoding, Loop, Marking, Walk
from qmoe_format import gpu
from qmoe_format.gpu import run_batches
from qmoe_format.gpu.run_batches import Batch
from qmoe_format.gpu.runs import GUARD
from tests.gpu import run_reference
from tests.gpu.problems import random_levels
from tests.gpu.variants import H200

LOADS = ["LDS R1, [R2] ;"]
# Two instructions, and a branch around one; a group's three; the walk; the tail, with a way around
# eight codes; the group's last two.
PRODUCT = {
    ".L_x_0": ["MOV R1, R2 ;", "@P0 BRA `(.L_x_1) ;", "MOV R1, R3 ;"],
    ".L_x_1": ["@!P1 EXIT ;", "BAR.SYNC.DEFER_BLOCKING 0x0 ;"],
    ".L_x_2": ["IADD3 R1, R1, R2, R3 ;"],
    ".L_x_3": [*LOADS * 32, "@P2 LOP3.LUT R1, R1, R2, R3 ;", "@P1 BRA `(.L_x_3) ;"],
    ".L_x_4": ["@P0 BRA P2, `(.L_x_5) ;", *LOADS * 8],
    ".L_x_5": [*LOADS, "BRA.DIV UR4, `(.L_x_7) ;", "STG.E [R2], R1 ;", "@P0 BRA `(.L_x_2) ;"],
    ".L_x_6": ["EXIT ;"],
    ".L_x_7": ["WARPSYNC ;", "BRA `(.L_x_6) ;"],
}
# Clearing; the walk; the tail; for 16 tokens the step, for 8 another one before; sums.
MARKING = {
    ".L_x_0": ["MOV R1, R2 ;"],
    ".L_x_1": ["STS.128 [R1], RZ ;"],
    ".L_x_2": ["VIADDMNMX.U32 R1, R1, R2, R3 ;", *["ATOMS.OR RZ, [R2], R1 ;"] * 32],
    ".L_x_3": ["@P1 BRA `(.L_x_2) ;"],
    ".L_x_4": [*["ATOMS.OR RZ, [R2], R1 ;"] * 32, "@P0 BRA `(.L_x_1) ;"],
    ".L_x_5": ["MOV R1, R2 ;"],
    ".L_x_6": [*["HMMA.16816.F32.BF16 R4, R8, R12, R4 ;"] * 48, "@P0 BRA `(.L_x_6) ;"],
    ".L_x_7": [*["HMMA.16816.F32.BF16 R4, R8, R12, R4 ;"] * 96, "SHF.L.U32 R1, R1, 0x1, RZ ;"],
    ".L_x_8": ["@P0 BRA `(.L_x_7) ;", "STG.E.U16 [R2], R1 ;", "@P0 BRA `(.L_x_5) ;", "EXIT ;"],
}
# A prologue; the walk; the tail; rows at any address; the others, 16 weights a turn.
DECODING = {
    ".L_x_0": ["MOV R1, R2 ;", "BAR.SYNC.DEFER_BLOCKING 0x0 ;"],
    ".L_x_1": [*["SEL R1, R2, R3, P0 ;", "STS.U8 [R1], R2 ;"] * 32, "@P1 BRA `(.L_x_1) ;"],
    ".L_x_2": [*["STS.U8 [R1], R2 ;"] * 32, "@P0 BRA `(.L_x_4) ;"],
    ".L_x_3": ["STG.E.U16 [R2], R1 ;", "@P0 BRA `(.L_x_3) ;", "EXIT ;"],
    ".L_x_4": ["PRMT R1, R2, R3, R4 ;", *["STG.E.128 [R2], R4 ;"] * 2, "@P0 BRA `(.L_x_4) ;"],
    ".L_x_5": ["EXIT ;"],
}
LAYOUT = gpu_codes.layout_of(4096, 14336, 0.885)
WALK = Walk(prologue=300, walk=330, alu=280, group=200, tail=400)


def listing(blocks: dict[str, list[str]]) -> Listing:
    lines, at = [], 0
    for label, instructions in blocks.items():
        lines.append(f"{label}:")
        for text in instructions:
            lines.append(f"        /*{at:04x}*/                   {text}")
            at += 16
    return Listing("\n".join(lines))


def batch_of(rows: int, columns: int, zeros: float) -> Batch:
    found = run_batches.choose(gpu_codes.layout_of(rows, columns, zeros), 1, "bf16", H200)
    assert found is not None
    return found


BATCH = batch_of(4096, 14336, 0.885)


def test_the_parts_of_a_product() -> None:
    found = gpu_parts.product(listing(PRODUCT))
    assert found == Walk(prologue=6, walk=34, alu=1, group=5, tail=9)


def test_the_parts_of_a_product_of_several_tokens() -> None:
    walk = Walk(prologue=2, walk=34, alu=1, group=3, tail=31)
    assert gpu_parts.marking(listing(MARKING), BATCH) == Marking(walk, Loop(98, 1, 96), rest=52)


def test_the_parts_of_decoding() -> None:
    found = gpu_parts.decoding(listing(DECODING), refined=False)
    assert found == Decoding(Walk(2, 65, 32, group=2, tail=31), Loop(4, 1, 0), vectors=2)


@pytest.mark.parametrize(
    ("rows", "columns", "zeros", "lanes"), [(96, 1536, 0.6, 2), (64, 2048, 0.95, 16)]
)
def test_codes_are_those_of_random_levels(
    rows: int, columns: int, zeros: float, lanes: int
) -> None:
    layout = replace(gpu_codes.layout_of(rows, columns, zeros), lanes=lanes)
    levels = random_levels(rows, columns, zeros, np.random.default_rng(0))
    found = run_reference.runs(levels[None], layout)
    mean = float(np.diff(found["offsets"][0].astype(int))[:-1].mean())
    assert gpu_codes.codes_of(layout, zeros) == pytest.approx(mean, rel=0.03)
    kept = sum(array.nbytes for array in found.values()) - 128 * GUARD + 4 * rows
    bits = gpu_codes.bits_of(layout, zeros)
    assert bits.all == pytest.approx(8 * kept / levels.size, rel=0.03)
    assert bits.starts == 8 * found["starts"].nbytes / levels.size


def test_codes_of_rows_in_the_order_of_the_file() -> None:
    layout = replace(gpu_codes.layout_of(96, 1536, 0.885), lanes=2)
    levels = random_levels(96, 1536, 0.885, np.random.default_rng(0))
    paths = [[run_reference.landings(sign * row, layout) for sign in (1, -1)] for row in levels]
    longest = np.array([max(map(len, halves)) for halves in paths]).reshape(12, 8).max(axis=1)
    found = gpu_codes.codes_of(layout, 0.885, ordered=False)
    assert found == pytest.approx(np.ceil(longest / 2).mean(), rel=0.03)
    assert found > 1.03 * gpu_codes.codes_of(layout, 0.885)


def test_more_work_takes_longer() -> None:
    few, many = (gpu_clocks.product(LAYOUT, WALK, codes, 1)["H100"] for codes in (50, 100))
    assert 0 < few < many < 2 * few
    assert gpu_clocks.product(LAYOUT, WALK, 50, 8)["H100"] > 3 * few


def test_more_work_with_several_tokens_takes_longer() -> None:
    counted = Marking(WALK, Loop(600, 200, 96), 800)
    few, many = (gpu_clocks.several(BATCH, counted, 60, codes, 8) for codes in (50, 200))
    assert few.bound == "products: issue"
    assert many.bound == "marks: ALU"
    assert many.marking > 3 * few.marking > 0
    assert (few.first, *few[2:5]) == pytest.approx((many.first, *many[2:5]))
    assert few.all < many.all
    assert few.all == pytest.approx(few.first + few.marking + few.products + few.rest)
    assert gpu_clocks.several(BATCH, counted, 60, 50, 16).all > 1.8 * few.all
    slow = gpu_clocks.several(BATCH, counted._replace(step=Loop(300, 100, 192)), 60, 50, 8)
    assert slow.bound == "products: tensor cores"
    scaled = replace(BATCH, layout=replace(LAYOUT, column_scales=True))
    by_terms = gpu_clocks.several(scaled, counted._replace(step=Loop(300, 100, 48)), 60, 50, 8)
    assert by_terms.x == 2 * few.x
    assert by_terms.bound == "x from L2"
    assert by_terms.first > few.first


def test_blocks_share_out_all_groups() -> None:
    blocks = gpu_clocks.fills(100, 8, 3)
    assert len(blocks) == 132
    assert sum(map(sum, blocks)) == 800
    assert {sum(block) for block in blocks} == {6, 7}
    assert max(map(max, blocks)) == 3
    # Block 16 has groups 96 to 102: of one matrix, and of the next.
    assert blocks[16] == [3, 1, 3]
    assert gpu_clocks.fills(3, 2, 4) == [[1]] * 6


def test_more_levels_take_longer_to_decode() -> None:
    counted = Decoding(WALK, Loop(40, 10, 0), 2)
    few, many = (gpu_clocks.decode(LAYOUT, counted, codes) for codes in (50, 100))
    assert 0 < few < many < 2 * few
    assert gpu_clocks.decode(LAYOUT, counted._replace(vectors=1), 50) > few
    assert gpu_clocks.decode(LAYOUT, counted._replace(write=Loop(40, 40, 0)), 50) > few


def test_predictions_are_near_what_was_measured() -> None:
    ratio = report.load("gpu_model")["ratio"]
    assert 0.7 < ratio["least"] <= ratio["median"] <= ratio["most"] < 1.4


def test_what_is_saved_is_possible() -> None:
    saved = report.load("gpu_model")
    assert all(0.5 < each["all"] < 2.5 for each in saved["memory"])
    assert all(each["all"] <= each["then"] for each in saved["memory"])
    for each in saved["layers"]:
        assert each["all"] == each["inputs"] + each["output"] + each["sums"]
        assert each["inputs"] > each["output"] > each["sums"]
    for each in saved["16 tokens"]:
        parts = each["first"] + each["marking"] + max(each["products"], each["x"]) + each["rest"]
        assert each["all"] == pytest.approx(parts)
        assert 0.3 < each["times as fast"] < 5
        assert each["instructions"]["of them ALU"] < each["instructions"]["a code"] < 20
    assert all(each["predicted"] > 2 and each["writing"] > 30 for each in saved["decoding"])


def test_the_notes_have_what_is_saved() -> None:
    notes, saved = Path(gpu.__file__).with_name("NOTES.md").read_text(), report.load("gpu_model")
    assert gpu_model.memory_table(saved["memory"]) in notes
    assert gpu_model.sixteen_tokens_table(saved["16 tokens"]) in notes
    assert gpu_model.decoding_table(saved["decoding"]) in notes
