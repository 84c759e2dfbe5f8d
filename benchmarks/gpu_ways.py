"""What ``benchmarks.gpu`` measures: one matrix in three forms, and the ways to multiply by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import gpu_anchor, report
from benchmarks.gpu_timing import DEVICE, Work, copies
from qmoe_format import codec, gpu

FUSED = 8  # experts of a token
FUSED_TOKENS = (1, 4, 16)  # for each of these experts
TOKENS = (1, 2, 4, 8, 16, 32, 64)  # for one matrix

Shape = tuple[int, int]
Run = Callable[[int], object]
Turns = tuple[int, Run]  # number of copies, and what to do with one


class Problem:
    """A random matrix in our format, as a stack of experts, and in the anchor's.

    It is coded once; the experts are copies of it with scales of their own. ``trits`` int8
    [rows, columns] and ``low_high`` bf16 [rows, 2] are those of expert 0, on the device.
    """

    def __init__(self, rows: int, columns: int, zeros: float, profile: codec.Profile) -> None:
        self.rows, self.columns, self.zeros = rows, columns, zeros
        random = torch.Generator(DEVICE).manual_seed(rows + columns)
        share = torch.rand((rows, columns), generator=random, device=DEVICE)
        half = (1 - zeros) / 2
        self.trits = (share < half).to(torch.int8) - (share >= 1 - half).to(torch.int8)
        scales = 0.5 + torch.rand((rows, 2), generator=random, device=DEVICE)
        self.low_high = (scales * torch.tensor([-1, 1], device=DEVICE)).bfloat16()
        trits = self.trits.cpu().numpy()
        bits = self.low_high.view(torch.int16).cpu().numpy().view(np.uint16)
        self.matrix = codec.encode_matrix(
            trits,
            bits[:, None, :],
            width=profile.width,
            rows_per_segment=profile.rows_per_segment(columns),
            threads=report.machine()["cores"],
        )
        coded = self.matrix.trits
        self.bytes = coded.segment_bytes + 4 * (coded.count + 1) + bits.nbytes
        self.experts = FUSED * math.ceil(max(copies(self.bytes), 2 * FUSED) / FUSED)
        self.stack = gpu.upload([self.expert(number) for number in range(self.experts)])
        self.anchor = gpu_anchor.encode(trits, bits)
        stored = (self.anchor.codewords, self.anchor.offsets, self.anchor.low_high)
        self.anchor_bytes = sum(array.nbytes for array in stored)

    def expert(self, number: int) -> codec.EncodedMatrix:
        """The matrix times ``factor(number)``, which is added to the exponents of its scales."""
        exponent = np.uint16(number % 3 << 7)
        return replace(self.matrix, row_scale=self.matrix.row_scale + exponent)

    @staticmethod
    def factor(numbers: torch.Tensor) -> torch.Tensor:
        """What experts are times expert 0."""
        return 2.0 ** (numbers % 3)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns]: expert 0, from its trits."""
        scales = self.low_high.to(dtype)
        low, high = scales[:, :1], scales[:, 1:]
        zero = torch.zeros((), dtype=dtype, device=DEVICE)
        return torch.where(self.trits < 0, low, torch.where(self.trits > 0, high, zero))


def bf16(*shape: int) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(shape, dtype=torch.float32, device=DEVICE).bfloat16()


def empty(*shape: int) -> torch.Tensor:
    """bf16 to be written."""
    return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)


def work(
    call: str, way: tuple[str, str], zeros: float | None, shape: Shape, stored: int, turns: Turns
) -> Work:
    """``way``: family and name; ``stored``: bytes of a matrix."""
    kind, tokens = call.split()
    rows, columns = shape
    matrices = FUSED if kind == "fused" else 1
    vectors = 2 * int(tokens) * (columns + matrices * rows)
    copies, run = turns
    return Work(
        call,
        *way,
        zeros,
        bytes=matrices * stored + vectors,
        weights=matrices * int(tokens) * rows * columns,
        copies=copies,
        run=run,
    )


def ours(problem: Problem, x: torch.Tensor) -> Iterator[Work]:
    """One matrix with one token or several, eight experts, decoding; ``x`` bf16 [64, columns]."""
    rows, columns = shape = problem.rows, problem.columns
    stack = problem.stack
    one = [stack[number] for number in range(problem.experts)]

    def products(tokens: int) -> Turns:
        xs, y = x[:tokens], empty(tokens, rows)
        if tokens == 1:
            x0, y0 = xs[0], y[0]
            return problem.experts, lambda i: gpu.matvec(one[i], x0, out=y0)
        return problem.experts, lambda i: gpu.matmul(one[i], xs, out=y)

    def fused(tokens: int) -> Turns:
        xs, y = x[:tokens], empty(tokens, FUSED, rows)
        # Turn i: every token goes to experts 8 i to 8 i + 7.
        experts = torch.arange(problem.experts, dtype=torch.int32, device=DEVICE)
        turns = list(experts.view(-1, 1, FUSED).repeat(1, tokens, 1))
        return len(turns), lambda i: gpu.expert_matvec(stack, xs, turns[i], out=y)

    def decode() -> Turns:
        outs = list(empty(min(copies(2 * rows * columns), problem.experts), rows, columns))
        return len(outs), lambda i: gpu.decode(one[i], "bf16", out=outs[i])

    way = "ours", "qmoe_format.gpu"
    for tokens in TOKENS:
        yield work(f"one {tokens}", way, problem.zeros, shape, problem.bytes, products(tokens))
    for tokens in FUSED_TOKENS:
        yield work(f"fused {tokens}", way, problem.zeros, shape, problem.bytes, fused(tokens))
    yield replace(
        work("decode 0", way, problem.zeros, shape, problem.bytes, decode()),
        bytes=2 * rows * columns,  # that are written
        weights=rows * columns,
    )


def dense(values: torch.Tensor, x: torch.Tensor) -> Iterator[Work]:
    """torch with bf16 ``values`` [rows, columns], several functions for each call."""
    rows, columns = shape = values.shape[0], values.shape[1]
    stored = 2 * rows * columns
    sets = math.ceil(max(copies(stored), 2 * FUSED) / FUSED)
    experts = values.repeat(FUSED * sets, 1, 1)
    turns = experts.view(sets, FUSED, rows, columns)

    for tokens in TOKENS:
        for way, run in dense_products(experts, x[:tokens]):
            yield work(f"one {tokens}", ("bf16", way), None, shape, stored, (len(experts), run))
    for tokens in FUSED_TOKENS:
        for way, run in dense_fused(turns, x[:tokens]):
            yield work(f"fused {tokens}", ("bf16", way), None, shape, stored, (sets, run))


def dense_products(experts: torch.Tensor, x: torch.Tensor) -> Iterator[tuple[str, Run]]:
    """``x`` [tokens, columns] times one of ``experts`` [:, rows, columns]."""
    y = empty(len(x), experts.shape[1])
    w, wt, xt, yt = list(experts), list(experts.mT), x.t(), empty(experts.shape[1], len(x))
    if len(x) == 1:
        x0, y0 = x[0], y[0]
        yield "mv", lambda i: torch.mv(w[i], x0, out=y0)
    yield "mm, y = x Wt", lambda i: torch.mm(x, wt[i], out=y)
    yield "mm, yt = W xt", lambda i: torch.mm(w[i], xt, out=yt)


def dense_fused(turns: torch.Tensor, x: torch.Tensor) -> Iterator[tuple[str, Run]]:
    """``x`` [tokens, columns] times all eight experts of a turn [:, 8, rows, columns]."""
    tokens, rows = len(x), turns.shape[2]
    each = x.repeat(FUSED, 1, 1)
    y, yt = empty(FUSED, tokens, rows), empty(FUSED, rows, tokens)
    w, wt, each_t = list(turns), list(turns.mT), each.mT
    singles = [(list(expert_wt), list(y)) for expert_wt in wt]

    def loop(i: int) -> None:
        for expert_wt, expert_y in zip(*singles[i], strict=True):
            torch.mm(x, expert_wt, out=expert_y)

    yield "bmm, y = x Wt", lambda i: torch.bmm(each, wt[i], out=y)
    yield "bmm, yt = W xt", lambda i: torch.bmm(w[i], each_t, out=yt)
    yield "mm, eight times", loop
    grouped = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped is None:
        return
    rows_of_x = each.view(FUSED * tokens, -1)
    ends = tokens * torch.arange(1, FUSED + 1, dtype=torch.int32, device=DEVICE)
    try:
        grouped(rows_of_x, wt[0], offs=ends)
    except RuntimeError:  # not for this device
        return
    yield "grouped_mm", lambda i: grouped(rows_of_x, wt[i], offs=ends)


def anchors(problem: Problem, x: torch.Tensor) -> Iterator[Work]:
    """QMoE's kernel, one launch a matrix and token, with several sizes of block."""
    shape = problem.rows, problem.columns
    stored = max(copies(problem.anchor_bytes), 2 * FUSED)
    uploaded = gpu_anchor.upload(problem.anchor, stored)
    y = empty(FUSED, problem.rows)

    def products(warps: int, matrices: int) -> Run:
        launches = [
            gpu_anchor.matvec(anchor, x[0], y[i % matrices], warps)
            for i, anchor in enumerate(uploaded)
        ]

        def run(i: int) -> None:
            for launch in launches[matrices * i : matrices * (i + 1)]:
                gpu_anchor.execute(launch)

        return run

    for warps in gpu_anchor.WARPS:
        way = "anchor", f"{warps} rows a block"
        arguments = way, problem.zeros, shape, problem.anchor_bytes
        yield work("one 1", *arguments, (stored, products(warps, 1)))
        yield work("fused 1", *arguments, (stored // FUSED, products(warps, FUSED)))
