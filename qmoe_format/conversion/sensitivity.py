"""How much an error in a block's experts changes what the model predicts.

The survey reads, besides its part of the text, a few of the sequences again, once as they are and
once for each block with experts. In the copy of a block, noise is added to what its experts return.
At the end, the divergence of a copy's predictions from the original's says what that noise did.

Errors of one size in different blocks can differ tenfold in what they do, and no size that is known
inside a block tells: that of its outputs as little as that of the hidden states they are added to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from qmoe_format.calibration.ranks import ALONE, Ranks
from qmoe_format.calibration.sequences import Batch, Tokens
from qmoe_format.calibration.walk import Walk

SHARE = 0.25  # as many as this part of the calibration text may all copies have together
_TOKENS = 256  # whose predictions are in memory at a time
NOISE = 0.03  # root mean square, relative to the hidden state after the block


class Probes:
    """Copies of sequences, one without noise and one for each block with experts.

    Attributes:
        batches: those of the survey, then one for each copy, of which no token is counted.
    """

    def __init__(self, batches: Sequence[Batch], blocks: int, sequences: int) -> None:
        """
        Args:
            batches: of the survey.
            blocks: how many blocks of the model have experts that run.
            sequences: of the calibration text.
        """
        number = max(1, int(SHARE * sequences / (blocks + 1)))
        copy = _head(batches[0], number)
        self.batches = [*batches, *[copy] * (blocks + 1)]
        self._blocks = blocks

    def _rows(self, counts: Sequence[int], copy: int) -> slice:
        """The rows of a copy among the tokens of a stage, ``counts`` of each batch."""
        first = len(counts) - self._blocks - 1 + copy
        return slice(sum(counts[:first]), sum(counts[: first + 1]))

    def disturb(
        self, outputs: Tensor, norms: Tensor, counts: Sequence[int], block: int, first: int = 0
    ) -> None:
        """Add noise to what a block's experts return, ``[tokens, d]``, in its own copy.

        Args:
            outputs: of this rank's tokens, all or none of a copy; the others' have other ranks.
            norms: of the hidden states after the block, ``[tokens, 1]``.
            counts: the tokens of each batch.
            block: its number among the blocks with experts.
            first: the number of this rank's first token.
        """
        rows = self._rows(counts, 1 + block)
        if not first <= rows.start < first + len(outputs):
            return
        own = outputs[rows.start - first : rows.stop - first]
        generator = torch.Generator().manual_seed(block)
        noise = torch.randn(own.shape, generator=generator)
        own += noise * (NOISE / outputs.shape[1] ** 0.5) * norms[rows].to(outputs)

    def sensitivities(self, walk: Walk, ranks: Ranks = ALONE) -> list[float]:
        """Of each block, by a walk that has come to the end: nats a token for errors as large as
        the hidden states, if they went on growing with the square."""
        first = len(self.batches) - self._blocks
        with walk.head() as head:
            original = walk.output(first - 1)
            found = [
                (block, _divergence(head, original, walk.output(first + block)) / NOISE**2)
                for block in range(ranks.rank, self._blocks, ranks.count)
            ]
        return [each for _, each in sorted(chain.from_iterable(ranks.gather(found)))]


def _divergence(head: Callable[[Tensor], Tensor], original: Tensor, other: Tensor) -> float:
    """The mean divergence of two predictions, in nats a token."""
    total = 0.0
    for first in range(0, len(original), _TOKENS):
        p, q = (head(x[first : first + _TOKENS]).log_softmax(-1) for x in (original, other))
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return max(0.0, total / max(1, len(original)))


def _head(batch: Batch, number: int) -> Batch:
    """The first sequences of a batch, of which no token is counted."""

    def head(tokens: Tokens) -> Tokens:
        ids, attended = tokens.ids[:number], tokens.attended[:number]
        return Tokens(ids, attended, torch.zeros_like(attended))

    return Batch(head(batch.inputs), head(batch.targets) if batch.targets else None)
