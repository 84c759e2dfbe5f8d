"""A block's experts, a group at a time: their weights, tokens, Hessians and outputs.

An expert belongs to one rank, which reads all its tokens. So no Hessians are summed over ranks:
less is moved, and sums do not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qmoe_format.calibration.activations import PairOutputs, RoutedTokens
from qmoe_format.calibration.ranks import ALONE, Ranks
from qmoe_format.checkpoints import Checkpoint, ExpertStack, LayerStacks
from qmoe_format.conversion.parallel import Resources
from qmoe_format.errors import QMoEError
from qmoe_format.quantize.hessian import Statistics, bounded_importance
from qmoe_format.quantize.importance import derivatives, importance

Weights = dict[str, Tensor]
"""float32 ``[experts, rows, columns]`` by stack."""

_QUANTIZER = 20.0  # multiplications per weight and column that quantizing an expert takes, about
_READING = 100.0  # per weight, that reading one takes


def count_weights(stacks: Iterable[ExpertStack]) -> int:
    """The weights in some stacks."""
    return sum(stack.weights for stack in stacks)


_MEASURED_TOKENS = 4096  # of an expert: enough for energies and for the importance of rows


class _Chunk(NamedTuple):
    """Some of an expert's tokens."""

    place: int  # of the expert in its group
    positions: Tensor  # int64 [m]
    gates: Tensor  # float32 [m], the router's weights
    inputs: Tensor  # float32 [m, d]
    products: list[Tensor]  # of the inputs and each input matrix, [m, rows], without biases
    biases: list[Tensor]  # of the expert, none or [rows] for each input matrix


class BlockExperts:
    """A block's experts and the tokens routed to them.

    Attributes:
        stacks: by name, in the checkpoint's order.
        count: the number of experts.
        own: the numbers of this rank's experts.
        counted: the number of tokens that count.
        elements: of the largest matrix and its Hessian.
        experts_in_memory: how many have room together.
        importance: the mean weight of a squared error in each row, as ``measure`` finds it, float32
            ``[experts, importance_columns]``; None if all rows count alike.
        importance_columns: for each row of the input matrices, and one for all of the output's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layer: LayerStacks,
        routed: RoutedTokens,
        resources: Resources,
        *,
        token_cap: float,
        all_experts: bool = False,
        ranks: Ranks = ALONE,
        quantizes: bool = True,
    ) -> None:
        """
        Args:
            checkpoint: has to stay open.
            layer: the block's stacks.
            token_cap, all_experts: see ``Calibration``.
            ranks: that share the experts.
            quantizes: whether these are to be quantized, or only measured.
        """
        self._checkpoint = checkpoint
        self._layer = layer
        self._inputs = [stack.name for stack in layer.inputs]
        self._output = layer.output.name
        self._routed = routed
        self.importance: Tensor | None = None
        self.importance_columns = 1 + sum(stack.rows for stack in layer.inputs)
        self.resources = resources
        self.stacks: Mapping[str, ExpertStack] = {stack.name: stack for stack in layer.stacks}
        stacks = self.stacks.values()
        self.count = layer.output.experts
        biases = checkpoint.parameters(layer.layer.biases if layer.runs else ()).values()
        # Of inputs and output, float32 [experts, rows], or none.
        self._biases = [bias.to(resources.device, torch.float32) for bias in biases]
        self.elements = max(s.rows * s.columns + s.columns**2 for s in stacks)
        # Matrices of the same inputs share their Hessian.
        hessians = [each.columns**2 for each in (layer.inputs[0], layer.output)]
        expert_bytes = 4 * (sum(stack.rows * stack.columns for stack in stacks) + sum(hessians))
        self.experts_in_memory = max(1, resources.group_bytes // expert_bytes)
        self.counted = int(routed.counted.sum())
        pairs = int((routed.experts >= 0)[routed.counted].sum())
        self._token_limit = max(1, math.ceil(token_cap * pairs / self.count))
        self._all_experts = all_experts
        widest = max(stack.columns for stack in stacks)
        self._chunk_tokens = max(resources.chunk_tokens, resources.chunk_elements // widest)
        per_token = sum(hessians) + 4 * sum(stack.rows * stack.columns for stack in stacks)
        fixed = sum(
            s.rows * s.columns * (_QUANTIZER * s.columns if quantizes else _READING) for s in stacks
        )
        self.own: Sequence[int] = range(self.count)
        if ranks.count > 1:
            self.own = ranks.packed([count * per_token + fixed for count in routed.counts])

    def groups(self) -> Iterator[Sequence[int]]:
        """This rank's experts, in groups that fit into memory and keep all workers busy."""
        concurrent = self.resources.concurrent_experts(self.elements)
        size = max(concurrent, self.experts_in_memory * self.resources.factor)
        for first in range(0, len(self.own), size):
            yield self.own[first : first + size]

    def share(self, units: int) -> int:
        """What some units of work of this rank are of the work of all, at the same speed."""
        return units * self.count // max(1, len(self.own))

    def weights(self, group: Sequence[int]) -> Weights:
        """The original matrices of some experts.

        Raises:
            QMoEError: ``value`` for a weight that is NaN or infinite.
        """
        return {name: self._read(stack, group) for name, stack in self.stacks.items()}

    def _read(self, stack: ExpertStack, group: Sequence[int]) -> Tensor:
        weights = torch.empty(len(group), stack.rows, stack.columns)
        for place, expert in enumerate(group):
            weights[place] = self._checkpoint.read_expert(stack, expert)
            if not torch.isfinite(weights[place]).all():
                raise QMoEError(
                    "value",
                    f"tensor {stack.member(expert)!r}: a weight is NaN, infinite, or too large for "
                    "float32",
                    "repair the model",
                )
        return weights.to(self.resources.device)

    def tokens(self, expert: int) -> tuple[Tensor, Tensor]:
        """An expert's tokens for its Hessians: positions int64 ``[m]``, router weights float32.

        Only counted ones; if they exceed the cap, as many as it allows, evenly spaced. With
        ``all_experts``, the tokens of other experts follow as far as the cap allows.
        """
        routed, counted = self._routed, self._routed.counted
        positions, gates = routed.tokens_of(expert)
        chosen = _spaced(counted[positions].nonzero().flatten(), self._token_limit)
        if not self._all_experts:
            return positions[chosen], gates[chosen]
        free = counted.index_fill(0, positions, False).nonzero().flatten()
        others = _spaced(free, self._token_limit - len(chosen))
        # To the model they do not matter at all. As much weight as one token has keeps the bits of
        # an expert in proportion to its use, but tells the rows of a hardly used one apart.
        one = routed.weights[routed.experts >= 0].square().mean()
        weights = (one / max(1, len(others))).sqrt().expand(len(others))
        return torch.cat([positions[chosen], others]), torch.cat([gates[chosen], weights])

    def statistics(self, weights: Weights, experts: Sequence[int]) -> dict[str, Statistics]:
        """Statistics for each matrix of some experts with these original ``weights``."""
        first, output = self._inputs[0], self._output
        number, device = len(experts), self.resources.device
        found = {
            m: Statistics.zeros(number, self.stacks[m].columns, device=device)
            for m in (first, output)
        }

        def add(chunk: _Chunk) -> None:
            found[first].add(chunk.place, chunk.inputs)
            found[output].add(chunk.place, self._hidden(chunk))

        self._visit(add, weights, experts)
        if len(self._inputs) > 1:
            found[first].known = {}
        for matrix in self._inputs[1:]:  # the same inputs, so the same sums
            found[matrix] = replace(found[first])
        if self.importance is not None:
            parts = self.by_stack(self.importance[list(experts)].double())
            for matrix, rows in parts.items():
                found[matrix].row_importance = rows * found[matrix].tokens[:, None]
        return found

    def by_stack(self, importance: Tensor) -> dict[str, Tensor]:
        """``[experts, rows]`` of each input matrix and ``[experts, 1]`` of the output, views."""
        sizes = [1 if name == self._output else each.rows for name, each in self.stacks.items()]
        return dict(zip(self.stacks, torch.split(importance, sizes, 1), strict=True))

    def measure(
        self, weights: Weights, experts: Sequence[int], norms: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """How much some experts do, and how much an error in each of their rows would.

        Estimates where an expert has many tokens. Errors count relative to the hidden states that
        they end up in.

        Args:
            norms: float32 ``[tokens, 1]``, of the hidden states after the block.

        Returns:
            ``quantize.rate.weighted_energies``, from outputs instead of Hessians: float64
            ``[experts, rows]`` by matrix; and the importance of rows, as the attribute, 0 for an
            expert without tokens.
        """
        number, stacks = len(experts), self.stacks
        squares = {m: torch.zeros(number, stacks[m].rows, dtype=torch.float64) for m in stacks}
        importance = torch.zeros(number, self.importance_columns, dtype=torch.float64)
        rows = self.by_stack(importance)
        counts = [0] * number

        def add(chunk: _Chunk) -> None:
            products = dict(zip(self._inputs, chunk.products, strict=True))
            products[self._output] = self._hidden(chunk) @ weights[self._output][chunk.place].T
            for matrix, product in products.items():
                squares[matrix][chunk.place] += product.square().sum(0, dtype=torch.float64).cpu()
            for matrix, weight in self._importance(weights, chunk, norms).items():
                rows[matrix][chunk.place] += weight.sum(0, dtype=torch.float64).cpu()
            counts[chunk.place] += len(chunk.positions)

        self._visit(add, weights, experts, _MEASURED_TOKENS)
        seen = torch.tensor(counts, dtype=torch.float64).clamp(min=1)[:, None]
        importance /= seen
        every = torch.tensor([len(self.tokens(expert)[0]) for expert in experts])
        energies = {
            matrix: squares[matrix]
            / stack.columns
            * (every[:, None] / seen)
            * bounded_importance(rows[matrix])
            for matrix, stack in stacks.items()
        }
        return energies, importance.float()

    def add_outputs(
        self, weights: Weights, group: Sequence[int], outputs: Tensor | PairOutputs
    ) -> None:
        """Add some experts' outputs for all their tokens, times router weights, to ``outputs``:
        float32 ``[tokens, d]``, or if other ranks have outputs for these tokens, pairs."""
        output = weights[self._output]
        chunks = (
            (place, number * self._chunk_tokens, *chunk)
            for place, expert in enumerate(group)
            for number, chunk in enumerate(self._chunks(*self._routed.tokens_of(expert)))
        )

        def result(item: tuple[int, int, Tensor, Tensor]) -> tuple[int, int, Tensor, Tensor]:
            place, first, *tokens = item
            chunk = self._multiplied(weights, place, group[place], *tokens)
            returned = self._hidden(chunk) @ output[chunk.place].T
            if self._biases:
                returned += self._biases[1][group[chunk.place]]
            returned = (returned * chunk.gates[:, None]).cpu()
            return group[place], first, chunk.positions, returned

        # A token may go to several of the experts: their outputs are added in a fixed order.
        for expert, first, positions, rows in self.resources.map(result, chunks, self.elements):
            if isinstance(outputs, PairOutputs):
                outputs.put(expert, first, rows)
            else:
                outputs[positions] += rows

    def _visit(
        self,
        call: Callable[[_Chunk], None],
        weights: Weights,
        experts: Sequence[int],
        most: int | None = None,
    ) -> None:
        """Call for all chunks of the experts' tokens, those of one expert in order.

        If ``most`` tokens of an expert are enough, not many more are taken, evenly spaced.
        """

        def visit(place: int) -> None:
            positions, gates = self.tokens(experts[place])
            step = max(1, len(positions) // most) if most else 1
            for chunk in self._chunks(positions[::step], gates[::step]):
                call(self._multiplied(weights, place, experts[place], *chunk))

        for _ in self.resources.map(visit, range(len(experts)), self.elements):
            pass

    def _chunks(self, positions: Tensor, gates: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(positions), self._chunk_tokens):
            part = slice(first, first + self._chunk_tokens)
            yield positions[part], gates[part]

    def _multiplied(
        self, weights: Weights, place: int, expert: int, positions: Tensor, gates: Tensor
    ) -> _Chunk:
        device = self.resources.device
        inputs = self._routed.inputs[positions].to(device)
        products = [inputs @ weights[matrix][place].T for matrix in self._inputs]
        rows = [product.shape[1] for product in products]
        biases = list(torch.split(self._biases[0][expert], rows)) if self._biases else []
        return _Chunk(place, positions, gates.to(device), inputs, products, biases)

    def _hidden(self, chunk: _Chunk) -> Tensor:
        """What the output matrix is multiplied by."""
        return self._layer.hidden(chunk.products, chunk.biases)

    def _importance(self, weights: Weights, chunk: _Chunk, norms: Tensor) -> dict[str, Tensor]:
        """The weight of a squared error of each row on each token, ``[tokens, rows or 1]``."""
        around = norms[chunk.positions, 0].to(self.resources.device)
        gates = chunk.gates / around.clamp(min=1e-12)
        found = {self._output: gates.square()[:, None]}
        output = weights[self._output][chunk.place]
        hidden = partial(self._layer.hidden, biases=chunk.biases)
        for matrix, slope in zip(self._inputs, derivatives(hidden, chunk.products), strict=True):
            # One matrix may have the rows of gate and up: both meet the same columns of the output.
            parts = self._layer.split_rows(slope, slope.shape[1] // output.shape[1])
            found[matrix] = self._layer.join_rows(
                [importance(part, output, gates) for part in parts]
            )
        return found


def _spaced(items: Tensor, limit: int) -> Tensor:
    """At most ``limit`` of some items, evenly spaced."""
    if len(items) <= limit:
        return items
    return items[torch.arange(limit) * len(items) // max(1, limit)]
