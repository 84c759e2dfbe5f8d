"""How much an error inside an expert matters to the model.

An expert's output is W_out z, z = f(pre_1, pre_2, ...) elementwise, pre_k = W_k x. A small error in
row j of W_k moves the output by w_out,j f_k'(t, j) (its error) x_t, so its square counts

    |w_out,j|^2 f_k'(t, j)^2        for token t and row j,

times the token's own weight. A Hessian for each row would be too much: the weights are taken as a
product of one for the token (their mean over rows) and one for the row (their sum over tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def derivatives(hidden: Callable[[Sequence[Tensor]], Tensor], pre: Sequence[Tensor]) -> list[Tensor]:
    """f_k' of an elementwise f at ``pre``, each ``[tokens, rows]``."""
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_() for each in pre]
        return list(torch.autograd.grad(hidden(leaves).sum(), leaves))


def importance(derivative: Tensor, output: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of tokens and rows.

    Args:
        derivative: f_k', ``[tokens, rows]``.
        output: W_out, ``[d, rows]``.
        gates: ``[tokens]``, the tokens' own weights.

    Returns:
        ``[tokens]`` to take as gates for W_k's Hessian, and float64 ``[rows]`` to be summed over
        chunks of tokens.
    """
    squares = derivative.square() * output.square().sum(0)
    weighted = squares * gates.square()[:, None]
    return gates * squares.mean(1).sqrt(), weighted.sum(0, dtype=torch.float64)
