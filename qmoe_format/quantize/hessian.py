"""Sums over calibration tokens, and what GPTQ needs of them.

The error that a quantised matrix Q makes in place of W on inputs x_t is

    sum_t |(W - Q) x_t|^2  =  tr((W - Q) S (W - Q)^T),     S = sum_t x_t x_t^T.

S is the Hessian of that error for each row of W (GPTQ, arXiv 2210.17323, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # not said to be exported

MOST_DAMPING = 100.0  # of the mean diagonal; with so much the Hessian says nothing any more


@dataclass(slots=True)
class Statistics:
    """What the calibration tokens say about one matrix of each of some experts.

    Attributes:
        sums: S, float32 or float64 ``[experts, columns, columns]``.
        tokens: int64 ``[experts]``, how many each has seen.
        row_importance: float64 ``[experts, rows]``, what a squared error of each row counts, a sum
            over tokens; ``[experts, 1]`` where all rows are alike.
    """

    sums: Tensor
    tokens: Tensor
    row_importance: Tensor

    @classmethod
    def zeros(
        cls,
        experts: int,
        columns: int,
        rows: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Statistics:
        """Of no tokens yet; ``rows`` is 1 where they do not differ in importance."""
        return cls(
            torch.zeros(experts, columns, columns, dtype=dtype, device=device),
            torch.zeros(experts, dtype=torch.int64),
            torch.zeros(experts, rows, dtype=torch.float64),
        )

    def of(self, experts: slice) -> Statistics:
        """Those of some of the experts; a view."""
        return Statistics(self.sums[experts], self.tokens[experts], self.row_importance[experts])

    def add(self, expert: int, inputs: Tensor) -> None:
        """Add tokens of one expert: x, ``[tokens, columns]``."""
        inputs = inputs.to(self.sums.dtype)
        self.sums[expert].addmm_(inputs.T, inputs)
        self.tokens[expert] += len(inputs)

    def weigh(self, expert: int, importance: Tensor) -> None:
        """Add what a squared error counts on each token and row, ``[tokens, rows or 1]``."""
        self.row_importance[expert] += importance.sum(0, dtype=torch.float64).cpu()

    def importance(self) -> Tensor:
        """rho_j, what a squared error of row j counts on a token: float64 ``[experts, rows or 1]``.

        None less than a thousandth of the expert's mean; 1 where nothing was weighed.
        """
        rho = self.row_importance / self.tokens.clamp(min=1)[:, None]
        mean = rho.mean(1, keepdim=True)
        return torch.where(mean > 0, torch.maximum(rho, 1e-3 * mean), 1.0)


@dataclass(frozen=True, slots=True)
class Factored:
    """Damped Hessians and their factors.

    Attributes:
        hessian: ``[experts, columns, columns]``, scaled to a mean diagonal of S of 1.
        factor: the same shape, ``inverse_factor`` of each.
        unit: float64 ``[experts]``, the mean diagonal of S; 1 for a fallback; on the CPU.
        damping: of each expert; None for a fallback.
        fallback: why an expert has the identity for a Hessian, or None.
    """

    hessian: Tensor
    factor: Tensor
    unit: Tensor
    damping: list[float | None]
    fallback: list[str | None]


def factored(statistics: Statistics, damping: Tensor) -> Factored:
    """H = S / unit + d I for each expert, and its factor, in float32 (damping: GPTQ, section 3.3).

    Where H is not positive definite, d grows tenfold until it is. An expert without tokens, or
    whose sums are of no use, gets the identity.

    Args:
        damping: ``[experts]``, d as a fraction of the mean diagonal.
    """
    hessian = statistics.sums.new_empty(statistics.sums.shape, dtype=torch.float32)
    factor = torch.empty_like(hessian)
    unit = torch.ones(len(hessian), dtype=torch.float64)
    used: list[float | None] = []
    why: list[str | None] = []
    for expert, sums in enumerate(statistics.sums):
        mean = float(sums.diagonal().double().mean())
        d = float(damping[expert])
        reason = None
        if not torch.isfinite(sums).all():
            reason = "Hessian is not finite"
        elif not mean > 0:
            reason = "inputs are all zero" if statistics.tokens[expert] else "no tokens"
        while reason is None:
            hessian[expert] = damped(sums, d)
            try:
                factor[expert] = inverse_factor(hessian[expert])
                break
            except LinAlgError:
                d *= 10
                reason = "singular Hessian" if d > MOST_DAMPING else None
        if reason is None:
            unit[expert] = mean
        else:
            hessian[expert] = torch.eye(len(sums), device=hessian.device)
            factor[expert] = hessian[expert]
        used.append(None if reason else d)
        why.append(reason)
    return Factored(hessian, factor, unit, used, why)


def damped(sums: Tensor, damping: float) -> Tensor:
    """S / m + d I in float32, m the mean diagonal of S ``[columns, columns]``.

    The scale changes no decision of a quantiser, and keeps float32 in range.
    """
    result = (sums.double() / sums.diagonal().double().mean()).float()
    result.diagonal().add_(damping)
    return result


def inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with H^-1 = U^T U, for positive definite H ``[..., columns, columns]``.

    With the order of rows and columns reversed, H = L L^T becomes H = V V^T with V upper, so
    U = V^-1: no inverse of H is ever formed. Computed in float64, returned in H's type.

    Raises:
        LinAlgError: an H is not positive definite.
    """
    upper = torch.linalg.cholesky(hessian.double().flip(-2, -1)).flip(-2, -1)
    eye = torch.eye(hessian.shape[-1], dtype=upper.dtype, device=upper.device).expand_as(upper)
    factor: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return factor.to(hessian.dtype)


def relative_error(weights: Tensor, quantized: Tensor, sums: Tensor) -> Tensor:
    """tr((W-Q) S (W-Q)^T) / tr(W S W^T), float64 ``[experts]``; NaN where the latter is 0.

    Args:
        weights, quantized: ``[experts, rows, columns]``.
        sums: ``[experts, columns, columns]``.
    """
    triples = zip(weights, quantized, sums, strict=True)
    return torch.stack(
        [row_energies(w - q, s).sum() / row_energies(w, s).sum() for w, q, s in triples]
    )


def row_energies(weights: Tensor, sums: Tensor) -> Tensor:
    """w_j S w_j / columns of each row, float64 ``[rows]``.

    Args:
        weights: ``[rows, columns]``.
        sums: ``[columns, columns]``.
    """
    # Products in float32, of numbers near 1.
    largest = weights.abs().amax().double().clamp(min=torch.finfo(torch.float64).tiny)
    mean = sums.diagonal().double().mean()
    scaled = (weights.double() / largest).float()
    unit = (sums.double() / torch.where(mean > 0, mean, 1.0)).float()
    return ((scaled @ unit) * scaled).mean(1, dtype=torch.float64) * mean * largest.square()
