"""How much an error inside an expert matters to the model.

An expert's output is W_out z, z = f(pre_1, pre_2, ...) elementwise, pre_k = W_k x. A small error in
row j of W_k moves the output by w_out,j f_k'(t, j) (its error) x_t, so its square is weighted by

    |w_out,j|^2 f_k'(t, j)^2        for token t and row j,

times the square of the token's own weight. A Hessian per row would be too large. Instead, all
tokens count alike in the Hessian, and the mean of this over tokens says how many bits a row
deserves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def derivatives(
    hidden: Callable[[Sequence[Tensor]], Tensor], pre: Sequence[Tensor]
) -> list[Tensor]:
    """f_k' of an elementwise f at ``pre``, each ``[tokens, rows]``."""
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_() for each in pre]
        return list(torch.autograd.grad(hidden(leaves).sum(), leaves))


def importance(derivative: Tensor, output: Tensor, gates: Tensor) -> Tensor:
    """The weight of a squared error of each row on each token, ``[tokens, rows]``.

    Args:
        derivative: f_k', ``[tokens, rows]``.
        output: W_out, ``[d, rows]``.
        gates: the tokens' own weights, ``[tokens]``.
    """
    return derivative.square() * output.square().sum(0) * gates.square()[:, None]
