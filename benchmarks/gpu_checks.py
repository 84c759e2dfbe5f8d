"""Whether what ``benchmarks.gpu`` measures is right: products in binary64, decoding to the bit."""

from __future__ import annotations

import torch

from benchmarks import gpu_anchor
from benchmarks.gpu_timing import DEVICE
from benchmarks.gpu_ways import FUSED, Problem, bf16
from qmoe_format import gpu

# Largest rounding error, relative to the result.
_ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Wrong(Exception):
    """A result that rounding does not explain."""


class Reference:
    """Products of ``problem`` in binary64, and what an answer may differ from them."""

    def __init__(self, problem: Problem) -> None:
        self.weights = problem.values(torch.float64)
        self.name = f"{problem.rows} x {problem.columns}, zeros {problem.zeros}"

    def check(
        self, what: str, y: torch.Tensor, x: torch.Tensor, factor: torch.Tensor | float = 1.0
    ) -> None:
        """y [..., rows] = factor [..., 1] * W x, for x [..., columns], by [M-1] and one rounding.

        Raises ``Wrong`` if it is not.
        """
        x = x.double()
        exact = x @ self.weights.T * factor
        summing = (self.weights.shape[1] + 8) * 2.0**-24 * (x.abs() @ self.weights.abs().T) * factor
        error = (y.double() - exact).abs()
        allowed = summing + _ROUNDING[y.dtype] * (exact.abs() + summing)
        if not bool((error <= allowed).all()):  # NaN is wrong, too
            worst = float((error / allowed).nan_to_num(torch.inf).max())
            raise Wrong(f"{self.name}: {what} is wrong, {worst:.3g} times what rounding allows")


def unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN everywhere."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def check(problem: Problem) -> None:
    """Everything that is measured on ``problem``. Raises ``Wrong``."""
    rows, columns = problem.rows, problem.columns
    reference = Reference(problem)
    matrix, stack = problem.stack[0], problem.stack
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = bf16(65, columns).to(dtype)
        y = unwritten(rows, dtype=dtype)
        gpu.matvec(matrix, x[0], out=y)
        reference.check(f"matvec, {dtype}", y, x[0])
        for tokens in (1, 2, 5, 16, 65):
            y = unwritten(tokens, rows, dtype=dtype)
            gpu.matmul(matrix, x[:tokens], out=y)
            reference.check(f"matmul of {tokens} tokens, {dtype}", y, x[:tokens])

    for tokens in (1, 4, 16):
        x = bf16(tokens, columns)
        every = problem.experts
        experts = torch.randint(every, (tokens, FUSED), dtype=torch.int32, device=DEVICE)
        experts[0] = torch.arange(every - FUSED, every)
        factor = problem.factor(experts)
        name = f"expert_matvec of {tokens} tokens"
        y = unwritten(tokens, FUSED, rows, dtype=torch.bfloat16)
        gpu.expert_matvec(stack, x, experts, out=y)
        reference.check(name, y, x[:, None], factor[:, :, None])
        weights = torch.randint(1, 17, (tokens, FUSED), device=DEVICE) / 16
        y = unwritten(tokens, rows, dtype=torch.float32)
        gpu.expert_matvec(stack, x.float(), experts, weights, out=y)
        total = (weights * factor).sum(1)
        reference.check(f"{name} with weights", y, x, total[:, None])

    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        decoded = unwritten(rows, columns, dtype=dtype)
        gpu.decode(matrix, name, out=decoded)
        same = torch.uint8
        if not torch.equal(decoded.view(same), problem.values(dtype).view(same)):
            raise Wrong(f"{reference.name}: decoding to {name} is wrong")

    x, y = bf16(columns), unwritten(rows, dtype=torch.bfloat16)
    for anchor in gpu_anchor.upload(problem.anchor, 1):
        for warps in gpu_anchor.WARPS:
            y.fill_(torch.nan)
            gpu_anchor.execute(gpu_anchor.matvec(anchor, x, y, warps))
            reference.check(f"the anchor with {warps} rows a block", y, x)
