"""Which rate each block is quantized at, and whether it has to be quantized again.

Lambda (see ``quantize.rate.Rate``) is meant to be the same in the whole model. ``FixedRate`` keeps
one. ``TargetRate`` looks for the one that makes the experts as large as asked for: surveys of the
original model predict sizes, finished blocks correct the prediction, and lambda is chosen again for
the blocks that remain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from qmoe_format.checkpoints import ExpertStack
from qmoe_format.conversion.block_experts import count_weights
from qmoe_format.conversion.quantize_block import BlockRecord
from qmoe_format.conversion.survey import StackSurvey, reference_energy
from qmoe_format.errors import QMoEError
from qmoe_format.quantize.rate import Rate

LEAST_LAMBDA, MOST_LAMBDA = 1e-5, 10.0  # sizes between these two can be asked for
SLACK = 10.0  # how many times beyond them lambda may go to correct a prediction
CLOSE = 0.01  # of the bits asked for: a last block that misses them by more is quantized again
TOLERANCE = 0.02  # of the bits asked for: a conversion that misses them by more fails
ATTEMPTS = 5  # at a block
DRIFT = 2.0  # factor between the lambda of a block and that of the blocks after it
_similar = partial(math.isclose, rel_tol=0.02)  # lambdas: another attempt would be pointless

Attempt: TypeAlias = Callable[[Rate | None], BlockRecord]
"""Quantize a block at a rate, from the start."""


class FixedRate:
    """The same rate for every block; None for a recipe that takes none."""

    def __init__(self, rate: Rate | None = None) -> None:
        self._rate = rate

    def quantize(self, attempt: Attempt) -> BlockRecord:
        """Quantize the next block: call ``attempt``, once or more."""
        return attempt(self._rate)

    def finish(self, record: BlockRecord) -> None:
        """Take note of a block that was finished in an earlier run."""

    def check(self) -> None:
        """Check, when all blocks are finished, that the size is the one asked for."""


@dataclass(frozen=True, slots=True)
class _Finished:
    """Finished blocks: bytes by stack and by dictionary, and the bytes expected of them."""

    stack_bytes: Mapping[str, int] = field(default_factory=dict)
    dictionary_bytes: Mapping[str, int] = field(default_factory=dict)
    expected: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.stack_bytes.values()) + sum(self.dictionary_bytes.values())

    @property
    def ratio(self) -> float:
        """How much larger than expected."""
        return self.total / self.expected if self.expected else 1.0


class TargetRate:
    """The rates that make the experts as large as asked for."""

    def __init__(
        self, bits: float, stacks: Iterable[ExpertStack], surveys: Mapping[str, StackSurvey]
    ) -> None:
        """
        Raises:
            QMoEError: ``argument`` if that number of bits per weight is out of reach.
        """
        self._asked = bits
        self._surveys = surveys
        self._reference = reference_energy(surveys)
        self._weights = count_weights(stacks)
        self._finished = _Finished()
        most, least = (self._bits(self._finished, lam) for lam in (LEAST_LAMBDA, MOST_LAMBDA))
        self._advice = f"ask for {least:.3f} to {most:.3f} with this model, recipe and profile"
        if not least <= bits <= most:
            raise QMoEError("argument", f"{bits:g} bits per weight are out of reach", self._advice)

    def quantize(self, attempt: Attempt) -> BlockRecord:
        """Quantize the next block, again if necessary.

        Every block shows how much larger experts become than expected. It is quantized again if the
        blocks after it would have to make up for that with a lambda more than ``DRIFT`` away; the
        last one, until the whole model is ``CLOSE`` to the bits asked for, and with the best lambda
        once more if ``ATTEMPTS`` run out.
        """
        lam = self._solve(self._finished, self._finished.ratio)
        tried: list[tuple[float, float]] = []
        for _ in range(ATTEMPTS):
            record = attempt(Rate(lam, self._reference))
            better = self._better(lam, record, tried)
            if better is None:
                break
            lam = better
        self.finish(record)
        return record

    def _better(
        self, lam: float, record: BlockRecord, tried: list[tuple[float, float]]
    ) -> float | None:
        """Lambda for another attempt at a block; None if this one is good enough.

        ``tried`` has the attempts at the last block: the logarithm of lambda, the relative excess.
        """
        before, after = self._finished, self._with(record)
        if self._surveys.keys() - after.stack_bytes.keys():
            better = self._solve(before, after.ratio)
            drift = abs(math.log(self._solve(after, after.ratio) / lam))
            return better if drift > math.log(DRIFT) and not _similar(better, lam) else None
        excess = 8 * after.total / self._weights / self._asked - 1
        if abs(excess) <= CLOSE or len(tried) == ATTEMPTS - 1:
            return None
        expected = self._expected(before, lam, record["stack_bytes"])
        better = self._solve(before, (after.total - before.total) / expected)
        tried.append((math.log(lam), excess))
        if len(tried) == ATTEMPTS - 1:
            best, least = min(tried, key=lambda each: abs(each[1]))
            return None if abs(excess) == abs(least) else math.exp(best)
        low = max((each for each in tried if each[1] > 0), default=None)
        high = min((each for each in tried if each[1] < 0), default=None)
        if low and high:
            part = min(max(low[1] / (low[1] - high[1]), 0.1), 0.9)
            return math.exp(low[0] + part * (high[0] - low[0]))
        return None if _similar(better, lam) else better

    def finish(self, record: BlockRecord) -> None:
        """See ``FixedRate``."""
        self._finished = self._with(record)

    def check(self) -> None:
        """See ``FixedRate``; raises ``QMoEError("value")``."""
        bits = 8 * self._finished.total / self._weights
        if abs(bits / self._asked - 1) > TOLERANCE:
            raise QMoEError(
                "value",
                f"the experts have {bits:.4f} bits per weight instead of {self._asked:g}",
                f"{self._advice}, or give a lambda",
            )

    def _with(self, record: BlockRecord) -> _Finished:
        """All that is finished with another block."""
        before, lam = self._finished, record["lam"]
        assert lam is not None
        return _Finished(
            {**before.stack_bytes, **record["stack_bytes"]},
            {**before.dictionary_bytes, **record["dictionary_bytes"]},
            before.expected + self._expected(before, lam, record["stack_bytes"]),
        )

    def _solve(self, finished: _Finished, ratio: float) -> float:
        """Lambda for the remaining stacks, if they become ``ratio`` times as large as expected."""
        low, high = math.log(LEAST_LAMBDA / SLACK), math.log(MOST_LAMBDA * SLACK)
        for _ in range(40):
            middle = (low + high) / 2
            if self._bits(finished, math.exp(middle), ratio) > self._asked:
                low = middle
            else:
                high = middle
        return math.exp(high)

    def _bits(self, finished: _Finished, lam: float, ratio: float = 1.0) -> float:
        """Bits per weight of the whole model, if the remaining stacks get this lambda."""
        rest = [name for name in self._surveys if name not in finished.stack_bytes]
        expected = self._expected(finished, lam, rest)
        return 8 * (finished.total + ratio * expected) / self._weights

    def _expected(self, finished: _Finished, lam: float, names: Iterable[str]) -> float:
        """Bytes of some stacks and their new dictionaries by their surveys."""
        rate, total = Rate(lam, self._reference), 0.0
        known = set(finished.dictionary_bytes)
        for survey in (self._surveys[name] for name in names):
            size, used = survey.expected(rate)
            total = total + size + len(used - known) * survey.dictionary_bytes
            known |= used
        return total


RateControl: TypeAlias = FixedRate | TargetRate
