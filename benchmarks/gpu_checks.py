"""Whether what ``benchmarks.gpu`` measures is right: products in binary64, decoding to the bit."""

from __future__ import annotations

import torch

from benchmarks import gpu_anchor
from benchmarks.gpu_works import FUSED, Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Largest rounding error, relative to the result.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Wrong(Exception):
    """A result that rounding does not explain."""


class Reference:
    """Products of ``problem`` in binary64, and how far a result may be from them."""

    def __init__(self, problem: Problem) -> None:
        self.weights = problem.values(torch.float64)
        rows, columns = problem.shape
        self.name = f"{rows} x {columns}, zeros {problem.zeros}"

    def unwritten(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """NaN everywhere."""
        return torch.full(shape, torch.nan, dtype=dtype, device=self.weights.device)

    def check(
        self, what: str, y: torch.Tensor, x: torch.Tensor, factor: torch.Tensor | float = 1.0
    ) -> None:
        """Raise ``Wrong`` unless y is W x times ``factor`` by [M-1], rounded once.

        Args:
            what: a name for y.
            y: [..., rows].
            x: [..., columns].
            factor: [..., 1].
        """
        x = x.double()
        exact = x @ self.weights.T * factor
        summing = (self.weights.shape[1] + 8) * 2.0**-24 * (x.abs() @ self.weights.abs().T) * factor
        error = (y.double() - exact).abs()
        allowed = summing + ROUNDING[y.dtype] * (exact.abs() + summing)
        if not bool((error <= allowed).all()):  # NaN is wrong, too
            worst = float((error / allowed).nan_to_num(torch.inf).max())
            raise Wrong(f"{self.name}: {what} is wrong, {worst:.3g} times what rounding allows")


def check(problem: Problem) -> None:
    """Check everything that is measured on ``problem``; raise ``Wrong`` at the first error."""
    device, gpu, (rows, columns) = problem.device, problem.device.gpu, problem.shape
    reference = Reference(problem)
    matrix, stack = problem.stack[0], problem.stack
    for name, dtype in DTYPES.items():
        x = device.bf16(65, columns).to(dtype)
        y = reference.unwritten(rows, dtype=dtype)
        gpu.matvec(matrix, x[0], out=y)
        reference.check(f"matvec, {name}", y, x[0])
        for tokens in (1, 2, 5, 16, 65):
            y = reference.unwritten(tokens, rows, dtype=dtype)
            gpu.matmul(matrix, x[:tokens], out=y)
            reference.check(f"matmul of {tokens} tokens, {name}", y, x[:tokens])
        decoded = reference.unwritten(rows, columns, dtype=dtype)
        gpu.decode(matrix, name, out=decoded)
        if not torch.equal(decoded.view(torch.uint8), problem.values(dtype).view(torch.uint8)):
            raise Wrong(f"{reference.name}: decoding to {name} is wrong")

    for tokens in (1, 4, 16):
        x, count = device.bf16(tokens, columns), problem.experts
        experts = torch.randint(count, (tokens, FUSED), dtype=torch.int32, device=x.device)
        experts[0] = torch.arange(count - FUSED, count)
        factor = problem.factor(experts)
        y = reference.unwritten(tokens, FUSED, rows, dtype=torch.bfloat16)
        gpu.expert_matvec(stack, x, experts, out=y)
        reference.check(f"expert_matvec of {tokens} tokens", y, x[:, None], factor[:, :, None])
        weights = torch.randint(1, 17, (tokens, FUSED), device=x.device) / 16
        y = reference.unwritten(tokens, rows, dtype=torch.float32)
        gpu.expert_matvec(stack, x.float(), experts, weights, out=y)
        total = (weights * factor).sum(1)[:, None]
        reference.check(f"expert_matvec of {tokens} tokens with weights", y, x, total)

    x = device.bf16(columns)
    (anchor,) = gpu_anchor.upload(problem.anchor, 1, x.device)
    for warps in gpu_anchor.WARPS:
        y = reference.unwritten(rows, dtype=torch.bfloat16)
        device.execute(gpu_anchor.matvec(anchor, x, y, warps))
        reference.check(f"the anchor with {warps} rows per block", y, x)
