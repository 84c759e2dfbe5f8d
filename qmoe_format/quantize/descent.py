"""Block coordinate descent on error plus rate.

GPTQ decides each column once, before it knows those that follow. Descent revisits the columns, a
group of 16 at a time, with all others fixed. With G = (W - Q) H, the error of a group B of columns
is least at the real values

    x = q_B + G_B H_BB^-1,

which are rounded one after the other as in GPTQ, with the group's own Hessian. A row accepts its
new levels only if they lower error + price, so that the sum never rises; G is then updated. Groups
of one column would be ordinary coordinate descent; larger ones also find moves that only pay off
together, and other ones every round find more of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qmoe_format.codec.threads import in_parts
from qmoe_format.quantize.grids import Prices
from qmoe_format.quantize.hessian import inverse_factor
from qmoe_format.quantize.kernels.gptq_block import BLOCK, LANES, gptq_block
from qmoe_format.quantize.kernels.sweep import settle, sweep
from qmoe_format.quantize.gptq import by_halves

GROUP = 16


def by_rows(work, rows: int) -> None:
    threads = torch.get_num_threads() if rows >= 256 else 1
    def part(first, last):
        work(first * LANES, last * LANES)
    in_parts(rows // LANES, threads, part)


def gptq_pass(problem, factor: Tensor, scale: Tensor, column_scale: Tensor, prices: Prices, ternary: list[bool]) -> Tensor:
    """int8 ``[experts, rows, columns]``"""
    rest = problem.weights.clone()
    levels = torch.zeros(rest.shape, dtype=torch.int8)
    rows, columns = rest.shape[1:]
    errors = torch.empty(rows, columns)
    for e in range(len(rest)):
        block_errors = torch.empty(rows, BLOCK)
        args = [each[e].contiguous().numpy() for each in (scale, column_scale, prices.first, prices.further)]
        for part, other in by_halves(0, columns, BLOCK):
            if other is None:
                by_rows(lambda first, last: gptq_block(
                    rest[e].numpy(), factor[e].numpy(), levels[e].numpy(), block_errors.numpy(), part.start,
                    *args, bool(ternary[e]), first, last), rows)
                errors[:, part] = block_errors
            elif part.start < other.start:
                rest[e][:, other].addmm_(errors[:, part], factor[e][part, other], alpha=-1)
    return levels


class Descent:
    def __init__(self, rows: int, columns: int, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.blocks = columns // BLOCK
        self.columns = columns
        self.moves = np.empty((rows, columns // 4 + BLOCK), np.int32)
        self.sizes = np.empty((rows, columns // 4 + BLOCK), np.float32)
        self.marks = np.empty((self.blocks, rows), np.int32)

    def round(self, solution, hessian: Tensor, prices: Prices, ternary) -> Tensor:
        """float64 [experts, rows, 4]"""
        order = torch.randperm(self.blocks, generator=self.generator)
        members = torch.rand(self.blocks, BLOCK, generator=self.generator).argsort(1)
        groups = (order[:, None] * BLOCK + members).view(-1, GROUP)
        experts, rows, _ = solution.levels.shape
        sums = np.empty((experts, rows, 4))
        order, members = order.numpy() * BLOCK, members.numpy()
        for e in range(experts):
            factors = inverse_factor(hessian[e][groups[:, :, None], groups[:, None]]).contiguous()
            counts = np.zeros(rows, np.int32)
            args = [each[e].contiguous().numpy() for each in (solution.scale, solution.column_scale, prices.first, prices.further)]
            lv, g, t, r, h = (each[e].numpy() for each in (solution.levels, solution.gradient, solution.target, solution.ratio, hessian))

            def work(first, last):
                sweep(lv, g, t, r, h, factors.numpy(), *args, bool(ternary[e]), order, members, self.moves, self.sizes, counts, self.marks, first, last)
                settle(lv, g, t, h, *args[:2], order, self.moves, self.sizes, counts, self.marks, sums[e], first, last)

            by_rows(work, rows)
            solution.moved = float(counts.mean()) / self.columns
        return torch.from_numpy(sums)
