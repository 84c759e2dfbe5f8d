"""Sums over calibration tokens, and the damped Hessians that GPTQ needs.

The error of a quantized matrix Q in place of W on inputs x_t is

    sum_t |(W - Q) x_t|^2  =  tr((W - Q) S (W - Q)^T),     S = sum_t x_t x_t^T.

S is the Hessian of that error for each row of W (GPTQ, arXiv 2210.17323, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # an export not declared as one

_BLOCK = 1024  # columns: half of a symmetric matrix is computed, in blocks, where it is larger
MAX_DAMPING = 100.0  # of the mean diagonal; beyond that, a Hessian is hardly more than the identity


@dataclass(slots=True)
class Statistics:
    """What the calibration tokens say about the same matrix of several experts.

    Attributes:
        sums: S, float32 or float64 ``[experts, columns, columns]``.
        tokens: the number of tokens of each expert, int64 ``[experts]``.
        row_importance: the weight of a squared error in each row, summed over tokens, float64
            ``[experts, rows]``; ``[experts, 1]`` if all rows count alike.
        known: what ``factored`` has found, for matrices that share ``sums``; None if none do.
    """

    sums: Tensor
    tokens: Tensor
    row_importance: Tensor
    known: dict[Any, Any] | None = None

    @classmethod
    def zeros(
        cls,
        experts: int,
        columns: int,
        rows: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Statistics:
        """Statistics of no tokens; ``rows`` is 1 if all rows count alike."""
        return cls(
            torch.zeros(experts, columns, columns, dtype=dtype, device=device),
            torch.zeros(experts, dtype=torch.int64),
            torch.zeros(experts, rows, dtype=torch.float64),
        )

    def of(self, experts: slice) -> Statistics:
        """The statistics of some of the experts, as views."""
        known = self.known
        if known is not None:
            # Dampings are keys, too, and (1.0, 2.0) equals (1, 2).
            known = known.setdefault(("experts", experts.start, experts.stop, experts.step), {})
        importance = self.row_importance[experts]
        return Statistics(self.sums[experts], self.tokens[experts], importance, known)

    def add(self, expert: int, inputs: Tensor) -> None:
        """Add tokens of one expert, x ``[tokens, columns]``."""
        if self.known:
            _forget(self.known)
        inputs = inputs.to(self.sums.dtype)
        sums = self.sums[expert]
        for first in range(0, len(sums), _BLOCK):
            here, rest = slice(first, first + _BLOCK), slice(first + _BLOCK, None)
            sums[here, first:].addmm_(inputs[:, here].T, inputs[:, first:])
            sums[rest, here] = sums[here, rest].T
        self.tokens[expert] += len(inputs)

    def weigh(self, expert: int, importance: Tensor) -> None:
        """Add the weight of a squared error on each token and row, ``[tokens, rows or 1]``."""
        self.row_importance[expert] += importance.sum(0, dtype=torch.float64).cpu()

    def importance(self) -> Tensor:
        """rho_j, the mean weight of a squared error in row j: float64 ``[experts, rows or 1]``,
        within the bounds of ``bounded_importance``."""
        return bounded_importance(self.row_importance / self.tokens.clamp(min=1)[:, None])


def bounded_importance(rho: Tensor) -> Tensor:
    """At least a thousandth of the expert's mean; 1 without weights. ``[experts, rows]``."""
    mean = rho.mean(1, keepdim=True)
    return torch.where(mean > 0, torch.maximum(rho, 1e-3 * mean), 1.0)


@dataclass(frozen=True, slots=True)
class Factored:
    """Damped Hessians and their factors.

    Attributes:
        hessian: ``[experts, columns, columns]``, scaled so that S has a mean diagonal of 1.
        factor: ``inverse_factor`` of each, the same shape.
        unit: the mean diagonal of S, 1 for a fallback; float64 ``[experts]`` on the CPU.
        damping: of each expert; None for a fallback.
        fallback: why an expert has the identity for a Hessian, or None.
    """

    hessian: Tensor
    factor: Tensor
    unit: Tensor
    damping: list[float | None]
    fallback: list[str | None]


def factored(statistics: Statistics, damping: Tensor) -> Factored:
    """H = S / unit + d I of each expert, and its factor, in float32 (damping: GPTQ, section 3.3).

    Where H is not positive definite, d grows tenfold until it is. An expert without tokens, or with
    unusable sums, gets the identity.

    Args:
        statistics: of the experts' calibration tokens.
        damping: d as a fraction of the mean diagonal, ``[experts]``.
    """
    key = tuple(damping.tolist())
    if statistics.known and key in statistics.known:
        found: Factored = statistics.known[key]
        return found
    hessian = statistics.sums.new_empty(statistics.sums.shape, dtype=torch.float32)
    factor = torch.empty_like(hessian)
    unit = torch.ones(len(hessian), dtype=torch.float64)
    used: list[float | None] = []
    fallback: list[str | None] = []
    for expert, sums in enumerate(statistics.sums):
        mean = float(sums.diagonal().double().mean())
        d = float(damping[expert])
        reason = None
        if not torch.isfinite(sums).all():
            reason = "Hessian is not finite"
        elif not mean > 0:
            reason = "inputs are all zero" if statistics.tokens[expert] else "no tokens"
        while reason is None:
            # The scale changes no decision of a quantizer, and keeps float32 in range.
            for first in range(0, len(sums), _BLOCK):
                rows = slice(first, first + _BLOCK)
                hessian[expert, rows] = sums[rows].double() / mean
            hessian[expert].diagonal().add_(d)
            try:
                factor[expert] = inverse_factor(hessian[expert])
                break
            except LinAlgError:
                d *= 10
                reason = "singular Hessian" if d > MAX_DAMPING else None
        if reason is None:
            unit[expert] = mean
        else:
            hessian[expert] = torch.eye(len(sums), device=hessian.device)
            factor[expert] = hessian[expert]
        used.append(None if reason else d)
        fallback.append(reason)
    result = Factored(hessian, factor, unit, used, fallback)
    if statistics.known is not None:
        statistics.known[key] = result
    return result


def inverse_factor(hessian: Tensor, check: bool = True) -> Tensor:
    """U, upper triangular, with H^-1 = U^T U; factorized in float64, inverted in H's dtype.

    With the order of rows and columns reversed, H = L L^T becomes H = V V^T with V upper, so
    U = V^-1, and no inverse of H is ever formed.

    Args:
        hessian: H, positive definite ``[..., columns, columns]``.
        check: whether it is, for which the host has to wait for a GPU.

    Raises:
        LinAlgError: an H is not positive definite.
    """
    flipped = hessian.flip(-2, -1).double()
    lower, _ = torch.linalg.cholesky_ex(flipped, check_errors=check)
    upper = lower.to(hessian.dtype).flip(-2, -1)
    del flipped, lower
    inverse = torch.zeros_like(upper, memory_format=torch.contiguous_format)
    columns = hessian.shape[-1]
    for first in range(0, columns, _BLOCK):
        here = slice(first, min(first + _BLOCK, columns))
        own = upper[..., here, here]
        eye = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device).expand_as(own)
        inverse[..., here, here] = torch.linalg.solve_triangular(own, eye, upper=True)
        right = upper[..., :first, here] @ inverse[..., here, here]
        for above in range(0, first, _BLOCK):
            row = slice(above, above + _BLOCK)
            inverse[..., row, here] = -inverse[..., row, above:first] @ right[..., above:, :]
    return inverse


def _forget(known: dict[Any, Any]) -> None:
    """Forget what is known of all experts and of parts of them; the parts stay connected."""
    for key in [key for key, each in known.items() if isinstance(each, Factored)]:
        del known[key]
    for part in known.values():
        _forget(part)


def relative_error(weights: Tensor, quantized: Tensor, sums: Tensor) -> Tensor:
    """tr((W-Q) S (W-Q)^T) / tr(W S W^T), float64 ``[experts]``; 0 where nothing is lost.

    Args:
        weights: W, ``[experts, rows, columns]``.
        quantized: Q, the same shape.
        sums: S, ``[experts, columns, columns]``.
    """
    triples = list(zip(weights, quantized, sums, strict=True))
    lost = torch.stack([row_energies(w - q, s).sum() for w, q, s in triples])
    energy = torch.stack([row_energies(w, s).sum() for w, _, s in triples])
    same = (weights == quantized).flatten(1).all(1)  # even if the sums are infinite
    return torch.where(same | (lost == 0), 0.0, lost / energy)


def row_energies(weights: Tensor, sums: Tensor) -> Tensor:
    """w_j S w_j / columns of each row, float64 ``[rows]``.

    Args:
        weights: ``[rows, columns]``.
        sums: S, ``[columns, columns]``.
    """
    # The products are in float32, of values near 1.
    largest = weights.abs().amax().double().clamp(min=torch.finfo(torch.float64).tiny)
    mean = sums.diagonal().double().mean()
    scaled = (weights.double() / largest).float()
    unit = (sums.double() / torch.where(mean > 0, mean, 1.0)).float()
    return ((scaled @ unit) * scaled).mean(1, dtype=torch.float64) * mean * largest.square()
