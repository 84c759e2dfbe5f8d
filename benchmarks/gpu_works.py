"""What ``benchmarks.gpu`` measures: one matrix in three forms, and the ways to multiply by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import gpu_anchor, report
from benchmarks.gpu_timing import Cuda, Work
from qmoe_format import codec

FUSED = 8  # experts per token
FUSED_TOKENS = (1, 4, 16)  # per expert
TOKENS = (1, 2, 4, 8, 16, 32, 64)  # with one matrix

Run = Callable[[int], object]


class Problem:
    """A random matrix in our format, as a stack of experts, and in the anchor's.

    It is encoded once; the experts are copies of it with different scales.

    Attributes:
        levels: int8 [rows, columns], on the device.
        low_high: bf16 [rows, 2], the scales of expert 0, on the device.
    """

    def __init__(
        self,
        device: Cuda,
        shape: tuple[int, int],
        zeros: float,
        profile: codec.Profile,
        runs: bool = True,
    ) -> None:
        self.device, self.shape, self.zeros = device, shape, zeros
        rows, columns = shape
        random = torch.Generator(device.name).manual_seed(rows + columns)
        share = torch.rand((rows, columns), generator=random, device=device.name)
        half = (1 - zeros) / 2
        self.levels = (share < half).to(torch.int8) - (share >= 1 - half).to(torch.int8)
        scales = 0.5 + torch.rand((rows, 2), generator=random, device=device.name)
        self.low_high = (scales * torch.tensor([-1, 1], device=device.name)).bfloat16()
        levels = self.levels.cpu().numpy()
        bits = self.low_high.view(torch.int16).cpu().numpy().view(np.uint16)
        self.matrix = codec.encode_matrix(
            levels,
            bits,
            width=profile.width,
            rows_per_segment=profile.rows_per_segment(columns),
            threads=report.machine()["cores"],
        )
        mask = self.matrix.levels.mask
        self.experts = sets_of_experts(device, mask.segment_bytes) * FUSED
        experts = [self.expert(number) for number in range(self.experts)]
        self.stack = device.gpu.upload(experts, runs=runs)
        coded = mask.segment_bytes + 4 * (mask.lengths.size + 1)
        self.bytes = device.run_bytes(self.stack) // self.experts or coded + bits.nbytes
        self.anchor = gpu_anchor.encode(levels, bits)
        stored = (self.anchor.codewords, self.anchor.offsets, self.anchor.low_high)
        self.anchor_bytes = sum(array.nbytes for array in stored)

    def expert(self, number: int) -> codec.EncodedMatrix:
        """The matrix times ``factor(number)``, which is added to the exponents of its scales."""
        exponent = np.uint16(number % 3 << 7)
        return replace(self.matrix, row_scale=self.matrix.row_scale + exponent)

    @staticmethod
    def factor(numbers: torch.Tensor) -> torch.Tensor:
        """The experts' weights divided by those of expert 0."""
        return 2.0 ** (numbers % 3)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights of expert 0 [rows, columns], from its levels."""
        scales = self.low_high.to(dtype)
        low, high = scales[:, :1], scales[:, 1:]
        zero = scales.new_zeros(())
        return torch.where(self.levels < 0, low, torch.where(self.levels > 0, high, zero))


def sets_of_experts(device: Cuda, size: int) -> int:
    """How many sets of ``FUSED`` matrices of ``size`` bytes a work needs, two at least."""
    return math.ceil(max(device.copies(size), 2 * FUSED) / FUSED)


def work(
    call: str,
    family: str,
    way: str,
    zeros: float | None,
    shape: tuple[int, int],
    stored: int,
    copies: int,
    run: Run,
) -> Work:
    """A product with one matrix or, fused, with ``FUSED``; ``stored``: bytes of a matrix."""
    kind, tokens = call.split()
    rows, columns = shape
    matrices = FUSED if kind == "fused" else 1
    vectors = 2 * int(tokens) * (columns + matrices * rows)
    weights = matrices * int(tokens) * rows * columns
    return Work(call, family, way, zeros, matrices * stored + vectors, weights, copies, run)


def ours(problem: Problem, x: torch.Tensor) -> Iterator[Work]:
    """One matrix with one token or several, eight experts, decoding; ``x`` bf16 [64, columns]."""
    rows, columns = problem.shape
    device, gpu, stack, experts = problem.device, problem.device.gpu, problem.stack, problem.experts
    one = [stack[number] for number in range(experts)]
    numbers = torch.arange(experts, dtype=torch.int32, device=x.device).view(-1, 1, FUSED)

    def product(tokens: int) -> Run:
        xs, y = x[:tokens], device.empty(tokens, rows)
        if tokens == 1:
            x0, y0 = xs[0], y[0]
            return lambda i: gpu.matvec(one[i], x0, out=y0)
        return lambda i: gpu.matmul(one[i], xs, out=y)

    def fused(tokens: int) -> Run:
        xs, y = x[:tokens], device.empty(tokens, FUSED, rows)
        turns = list(numbers.repeat(1, tokens, 1))  # turn i: experts 8 i to 8 i + 7, every token
        return lambda i: gpu.expert_matvec(stack, xs, turns[i], out=y)

    what = ("ours", "qmoe_format.gpu", problem.zeros, problem.shape, problem.bytes)
    for tokens in TOKENS:
        yield work(f"one {tokens}", *what, experts, product(tokens))
    for tokens in FUSED_TOKENS:
        yield work(f"fused {tokens}", *what, len(numbers), fused(tokens))
    outs = list(device.empty(min(device.copies(2 * rows * columns), experts), rows, columns))
    decode = work("decode 0", *what, len(outs), lambda i: gpu.decode(one[i], "bf16", out=outs[i]))
    yield replace(decode, bytes=2 * rows * columns, weights=rows * columns)


def dense(device: Cuda, values: torch.Tensor, x: torch.Tensor) -> Iterator[Work]:
    """torch with bf16 ``values`` [rows, columns], several functions for each call."""
    rows, columns = values.shape
    what = (None, (rows, columns), 2 * rows * columns)
    sets = sets_of_experts(device, 2 * rows * columns)
    experts = values.repeat(FUSED * sets, 1, 1)
    turns = experts.view(sets, FUSED, rows, columns)
    for tokens in TOKENS:
        for way, run in dense_products(experts, x[:tokens]):
            yield work(f"one {tokens}", "bf16", way, *what, len(experts), run)
    for tokens in FUSED_TOKENS:
        for way, run in dense_fused(turns, x[:tokens]):
            yield work(f"fused {tokens}", "bf16", way, *what, sets, run)


def dense_products(experts: torch.Tensor, x: torch.Tensor) -> Iterator[tuple[str, Run]]:
    """``x`` [tokens, columns] times one of ``experts`` [:, rows, columns]."""
    tokens, rows = len(x), experts.shape[1]
    y, yt = x.new_empty((tokens, rows)), x.new_empty((rows, tokens))
    w, wt, xt = list(experts), list(experts.mT), x.t()
    if tokens == 1:
        x0, y0 = x[0], y[0]
        yield "mv", lambda i: torch.mv(w[i], x0, out=y0)
    yield "mm, y = x Wt", lambda i: torch.mm(x, wt[i], out=y)
    yield "mm, yt = W xt", lambda i: torch.mm(w[i], xt, out=yt)


def dense_fused(turns: torch.Tensor, x: torch.Tensor) -> Iterator[tuple[str, Run]]:
    """``x`` [tokens, columns] times all eight experts of a turn [:, 8, rows, columns]."""
    tokens, rows = len(x), turns.shape[2]
    each = x.repeat(FUSED, 1, 1)
    y, yt = x.new_empty((FUSED, tokens, rows)), x.new_empty((FUSED, rows, tokens))
    w, wt, each_t = list(turns), list(turns.mT), each.mT
    singles = [(list(expert_wt), list(y)) for expert_wt in wt]

    def loop(i: int) -> None:
        for expert_wt, expert_y in zip(*singles[i], strict=True):
            torch.mm(x, expert_wt, out=expert_y)

    def vectors(i: int) -> None:
        for expert, expert_y in zip(w[i], one_y, strict=True):
            torch.mv(expert, x0, out=expert_y)

    if tokens == 1:
        x0, one_y = x[0], list(y[:, 0])
        yield "mv, eight times", vectors
    yield "bmm, y = x Wt", lambda i: torch.bmm(each, wt[i], out=y)
    yield "bmm, yt = W xt", lambda i: torch.bmm(w[i], each_t, out=yt)
    yield "mm, eight times", loop
    grouped = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped is None:
        return
    rows_of_x = each.view(FUSED * tokens, -1)
    ends = tokens * torch.arange(1, FUSED + 1, dtype=torch.int32, device=x.device)
    try:
        grouped(rows_of_x, wt[0], offs=ends)
    except RuntimeError:  # not supported on this device
        return
    yield "grouped_mm", lambda i: grouped(rows_of_x, wt[i], offs=ends)


def anchors(problem: Problem, x: torch.Tensor) -> Iterator[Work]:
    """QMoE's kernel, one launch per matrix and token, with several block sizes."""
    device, stored = problem.device, problem.anchor_bytes
    copies = max(device.copies(stored), 2 * FUSED)
    uploaded = gpu_anchor.upload(problem.anchor, copies, x.device)
    y = device.empty(FUSED, problem.shape[0])

    def products(warps: int, matrices: int) -> Run:
        launches = [
            gpu_anchor.matvec(anchor, x[0], y[i % matrices], warps)
            for i, anchor in enumerate(uploaded)
        ]

        def run(i: int) -> None:
            for launch in launches[matrices * i : matrices * (i + 1)]:
                device.execute(launch)

        return run

    for warps in gpu_anchor.WARPS:
        what = ("anchor", f"{warps} rows a block", problem.zeros, problem.shape, stored)
        yield work("one 1", *what, copies, products(warps, 1))
        yield work("fused 1", *what, copies // FUSED, products(warps, FUSED))
