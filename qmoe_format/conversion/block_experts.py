"""A block's experts, a group at a time: their weights, tokens, Hessians and outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qmoe_format.calibration.activations import Routed
from qmoe_format.checkpoints import Checkpoint, ExpertStack
from qmoe_format.checkpoints.wiring import Wiring
from qmoe_format.conversion.parallel import side_by_side, threads_within, times_on
from qmoe_format.errors import QMoEError
from qmoe_format.quantize.hessian import Statistics
from qmoe_format.quantize.importance import derivatives, importance

# Weights and Hessians of a group, if that is an expert for each thread; a quantizer needs a few
# times as much again.
GROUP_BYTES = 1 << 28
# Of the widest activation that is in memory at once: 4 MB, which an allocator keeps at hand. With
# fewer tokens than that at a time, most of it would be reading and writing the Hessian.
CHUNK_ELEMENTS, CHUNK_TOKENS = 1 << 20, 1 << 10

Weights = dict[str, Tensor]


class Layer:
    """A block's experts and the tokens that go to them.

    Matrices are named as in the family's ``Wiring``: ``wi``, ``wo``.

    Attributes:
        stacks: by matrix, in the checkpoint's order.
        experts: how many there are.
        elements: of the largest matrix and its Hessian.
        device: where to compute.
        workers: threads that torch has for it.
        abreast: how many experts are worked on at the same time.
        fitting: how many experts are in memory together, if that keeps all workers busy.
        threads: how many there are for what is always done on the CPU.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        head: str,
        wiring: Wiring,
        routed: Routed,
        *,
        token_cap: float,
        norms: Tensor | None,
        device: str,
        threads: int,
    ) -> None:
        """
        Args:
            checkpoint: has to stay open.
            head: what the names of the stacks begin with.
            wiring: of the family.
            routed: the tokens.
            token_cap: use at most so many times the mean number of tokens for an expert's Hessian.
            norms: float32 ``[tokens, 1]``, how long the hidden states after the block are: rows
                are weighed by what they matter to those. None: all count alike.
            device: where to compute.
            threads: how many to use.
        """
        self._checkpoint = checkpoint
        self._wiring = wiring
        self._routed = routed
        self._norms = norms
        self.device = device
        self.threads = threads
        self.workers = threads if device == "cpu" else 1  # a GPU has one queue
        self.stacks: Mapping[str, ExpertStack] = {
            stack.matrix: stack for stack in checkpoint.stacks if stack.head == head
        }
        self.experts = self.stacks[wiring.output].experts
        sizes = [stack.rows * stack.columns for stack in self.stacks.values()]
        # Matrices of the same inputs share their Hessian.
        hessians = [self.stacks[m].columns ** 2 for m in (wiring.inputs[0], wiring.output)]
        self.fitting = max(1, GROUP_BYTES // (4 * (sum(sizes) + sum(hessians))))
        self.elements = max(s.rows * s.columns + s.columns**2 for s in self.stacks.values())
        self.abreast = self.workers // threads_within(self.elements, self.workers)
        counted = int((routed.experts >= 0)[routed.counted].sum())
        self._most = max(1, math.ceil(token_cap * counted / self.experts))
        self._widest = max(stack.columns for stack in self.stacks.values())

    def groups(self) -> Iterator[range]:
        """All experts, as many at a time as fit into memory and keep all threads busy."""
        size = max(self.abreast, self.fitting * times_on(self.device))
        for first in range(0, self.experts, size):
            yield range(first, min(first + size, self.experts))

    def weights(self, group: range) -> Weights:
        """The original matrices of some experts, float32 ``[experts, rows, columns]``.

        Raises:
            QMoEError: ``value`` for a weight that is NaN or infinite.
        """
        return {matrix: self._read(stack, group) for matrix, stack in self.stacks.items()}

    def _read(self, stack: ExpertStack, group: range) -> Tensor:
        weights = torch.empty(len(group), stack.rows, stack.columns)
        for place, expert in enumerate(group):
            weights[place] = self._checkpoint.read_expert(stack, expert)
            if not torch.isfinite(weights[place]).all():
                raise QMoEError(
                    "value",
                    f"tensor {stack.member(expert)!r}: a weight is NaN or infinite, or too large "
                    "for float32; repair the model",
                )
        return weights.to(self.device)

    def tokens(self, expert: int) -> tuple[Tensor, Tensor]:
        """An expert's tokens for its Hessians: positions int64 ``[m]``, router weights float32.

        Of those that count, the most that the cap allows, evenly spaced.
        """
        positions, gates = self._routed.tokens_of(expert)
        chosen = self._routed.counted[positions].nonzero().flatten()
        if len(chosen) > self._most:
            chosen = chosen[torch.arange(self._most) * len(chosen) // self._most]
        return positions[chosen], gates[chosen]

    def statistics(self, weights: Weights, experts: Sequence[int]) -> dict[str, Statistics]:
        """What their tokens say about each matrix of some experts.

        Args:
            weights: their original ones.
            experts: their numbers.
        """
        first, output = self._wiring.inputs[0], self._wiring.output
        found = {
            matrix: Statistics.zeros(
                len(experts), self.stacks[matrix].columns, self._weighed(matrix), device=self.device
            )
            for matrix in (first, output)
        }
        for matrix in self._wiring.inputs[1:]:  # the same inputs, so the same sums
            rows = torch.zeros_like(found[first].row_importance)
            found[matrix] = replace(found[first], row_importance=rows)

        def add(place: int) -> None:
            for inputs, gates, positions in self._chunks(*self.tokens(experts[place])):
                before = self._before(weights, place, inputs)
                found[first].add(place, inputs)
                found[output].add(place, self._wiring.hidden(before))
                self._weigh(found, weights, place, before, gates, positions)

        for _ in side_by_side(add, range(len(experts)), self.elements, self.workers):
            pass
        return found

    def energies(self, weights: Weights, experts: Sequence[int]) -> dict[str, Tensor]:
        """``quantize.rd.weighted_energies`` of each matrix, from its outputs: no Hessian is needed.

        Args:
            weights: the experts' original ones.
            experts: their numbers.

        Returns:
            float64 ``[experts, rows]`` by matrix.
        """
        stacks, output = self.stacks, self._wiring.output
        squares = {
            matrix: torch.zeros(len(experts), stack.rows, dtype=torch.float64)
            for matrix, stack in stacks.items()
        }
        # Of no columns: tokens and importance only.
        found = {m: Statistics.zeros(len(experts), 0, self._weighed(m)) for m in stacks}

        def add(place: int) -> None:
            for inputs, gates, positions in self._chunks(*self.tokens(experts[place])):
                before = self._before(weights, place, inputs)
                products = dict(zip(self._wiring.inputs, before, strict=True))
                products[output] = self._wiring.hidden(before) @ weights[output][place].T
                for matrix, product in products.items():
                    squares[matrix][place] += product.square().sum(0, dtype=torch.float64).cpu()
                    found[matrix].add(place, torch.empty(len(positions), 0))
                self._weigh(found, weights, place, before, gates, positions)

        for _ in side_by_side(add, range(len(experts)), self.elements, self.workers):
            pass
        return {
            matrix: squares[matrix] / stack.columns * found[matrix].importance()
            for matrix, stack in stacks.items()
        }

    def _weighed(self, matrix: str) -> int:
        """How many rows of a matrix differ in importance."""
        alike = self._norms is None or matrix == self._wiring.output
        return 1 if alike else self.stacks[matrix].rows

    def _weigh(
        self,
        found: dict[str, Statistics],
        weights: Weights,
        place: int,
        before: Sequence[Tensor],
        gates: Tensor,
        positions: Tensor,
    ) -> None:
        """Add the importance of some tokens of an expert."""
        if self._norms is None:
            return
        wiring = self._wiring
        gates = gates / self._norms[positions, 0].to(self.device).clamp(min=1e-12)
        found[wiring.output].weigh(place, gates.square()[:, None])
        output = weights[wiring.output][place]
        for matrix, slope in zip(wiring.inputs, derivatives(wiring.hidden, before), strict=True):
            # One matrix may have the rows of gate and up: both meet the same columns of the output.
            parts = slope.chunk(slope.shape[1] // output.shape[1], dim=1)
            rows = torch.cat([importance(part, output, gates) for part in parts], dim=1)
            found[matrix].weigh(place, rows)

    def add_outputs(self, weights: Weights, group: range, outputs: Tensor) -> None:
        """Add what some experts return for all their tokens, each times the router's weight.

        Args:
            weights: of the group, original or quantised.
            group: the experts.
            outputs: float32 ``[tokens, d]``; changed.
        """

        def result(item: tuple[int, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            place, inputs, gates, positions = item
            hidden = self._wiring.hidden(self._before(weights, place, inputs))
            returned = hidden @ weights[self._wiring.output][place].T
            return positions, (returned * gates[:, None]).cpu()

        items = (
            (place, *chunk)
            for place, expert in enumerate(group)
            for chunk in self._chunks(*self._routed.tokens_of(expert))
        )
        # A token may go to several of the experts: their outputs are added in one order.
        for positions, returned in side_by_side(result, items, self.elements, self.workers):
            outputs[positions] += returned

    def _before(self, weights: Weights, place: int, inputs: Tensor) -> list[Tensor]:
        """What the elementwise function of an expert is given."""
        return [inputs @ weights[matrix][place].T for matrix in self._wiring.inputs]

    def _chunks(self, positions: Tensor, gates: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(inputs, gates, positions) of some of the tokens at a time."""
        size = max(CHUNK_TOKENS, CHUNK_ELEMENTS // self._widest)
        for first in range(0, len(positions), size):
            some = positions[first : first + size]
            inputs = self._routed.inputs[some].to(self.device)
            yield inputs, gates[first : first + size].to(self.device), some
