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
            return problem.experts, lambda i: gpu.matvec(one[i], xs[0], out=y[0])
        return problem.experts, lambda i: gpu.matmul(one[i], xs, out=y)

    def fused(tokens: int) -> Turns:
        xs, y = x[:tokens], empty(tokens, FUSED, rows)
        experts = torch.arange(problem.experts, dtype=torch.int32, device=DEVICE)
        experts = experts.view(-1, 1, FUSED).repeat(
            1, tokens, 1
        )  # turn, token, expert of the token
        return len(experts), lambda i: gpu.expert_matvec(stack, xs, experts[i], out=y)

    def decode() -> Turns:
        outs = empty(min(copies(2 * rows * columns), problem.experts), rows, columns)
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
        xs, y, transposed = x[:tokens], empty(tokens, rows), empty(rows, tokens)
        for way, run in dense_products(experts, xs, y, transposed):
            yield work(f"one {tokens}", ("bf16", way), None, shape, stored, (len(experts), run))
    for tokens in FUSED_TOKENS:
        for way, run in dense_fused(turns, x[:tokens]):
            yield work(f"fused {tokens}", ("bf16", way), None, shape, stored, (sets, run))


def dense_products(
    experts: torch.Tensor, x: torch.Tensor, y: torch.Tensor, transposed: torch.Tensor
) -> Iterator[tuple[str, Run]]:
    """``x`` [tokens, columns] times one of ``experts``, into ``y`` or ``transposed``."""
    if len(x) == 1:
        yield "mv", lambda i: torch.mv(experts[i], x[0], out=y[0])
    yield "mm, y = x Wt", lambda i: torch.mm(x, experts[i].t(), out=y)
    yield "mm, yt = W xt", lambda i: torch.mm(experts[i], x.t(), out=transposed)


def dense_fused(turns: torch.Tensor, x: torch.Tensor) -> Iterator[tuple[str, Run]]:
    """``x`` [tokens, columns] times all eight experts of a turn [8, rows, columns]."""
    tokens, rows = len(x), turns.shape[2]
    each = x.repeat(FUSED, 1, 1)
    y, transposed = empty(FUSED, tokens, rows), empty(FUSED, rows, tokens)

    def loop(i: int) -> None:
        for expert in range(FUSED):
            torch.mm(x, turns[i, expert].t(), out=y[expert])

    yield "bmm, y = x Wt", lambda i: torch.bmm(each, turns[i].mT, out=y)
    yield "bmm, yt = W xt", lambda i: torch.bmm(turns[i], each.mT, out=transposed)
    yield "mm, eight times", loop
    grouped = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped is not None:
        rows_of_x = each.view(FUSED * tokens, -1)
        ends = tokens * torch.arange(1, FUSED + 1, dtype=torch.int32, device=DEVICE)
        yield "grouped_mm", lambda i: grouped(rows_of_x, turns[i].mT, offs=ends)


def anchors(problem: Problem, x: torch.Tensor) -> Iterator[Work]:
    """QMoE's kernel, one launch a matrix and token, with several sizes of block."""
    shape = problem.rows, problem.columns
    stored = copies(problem.anchor_bytes)
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
