"""What a ``.qmoe`` file of one of the small trained models has lost against the bf16 checkpoint.

Everything is computed in float32 on the evaluation text:

    KL            of the original's and the file's distributions, per target token
    loss gap      difference of their cross-entropies, per target token, in nats
    output error  tr((W-Q) S (W-Q)^T) / tr(W S W^T) of each expert's matrix, where S is the sum of
                  x x^T over its inputs x in the original model, without special tokens

An encoder-decoder fills in spans, see ``eval_span.py``; a causal model predicts each next token in
windows of 257.
"""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qmoe_format
from benchmarks.report import DATA
from qmoe_format.checkpoints import LayerStacks, open_checkpoint
from qmoe_format.dtypes import to_float32
from qmoe_format.quantize.hessian import Statistics, relative_error

EVALUATION_TEXT = DATA / "text" / "eval.jsonl"
CAUSAL_WINDOW = 257
BATCH = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows of the evaluation text.

    Attributes:
        inputs: the model's arguments.
        targets: int64 ``[windows, tokens]``.
        counted: which tokens are not special, by stack of blocks, bool ``[windows * tokens]``.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    counted: dict[str, Tensor]


class Evaluation:
    """A model, its evaluation text, and the outputs of the original."""

    def __init__(self, name: str, windows: int | None = None) -> None:
        """Run the original.

        Args:
            name: the model's folder in ``DATA``.
            windows: the number of windows, evenly spaced; by default all.
        """
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        folder = DATA / name
        config = json.loads((folder / "config.json").read_text())
        seq2seq = bool(config.get("is_encoder_decoder"))
        kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model: Any = kind.from_pretrained(folder, dtype=torch.float32).eval()
        self._batches = list(_batches(tokenizer, config, windows))
        with open_checkpoint(folder) as checkpoint:
            self._layers = checkpoint.layers
        self._matrices = _matrices(self._model, self._layers)
        self.original = {name: torch.stack(w) for name, w in self._matrices.items()}
        self.sums = {
            name: Statistics.zeros(len(weights), weights.shape[2])
            for name, weights in self.original.items()
        }
        self._run_original()

    @property
    def windows(self) -> int:
        return sum(len(batch.targets) for batch in self._batches)

    @torch.no_grad()
    def _run_original(self) -> None:
        """Collect the sums, and the LM head's inputs, which are smaller than its outputs."""
        counted: dict[str, Tensor] = {}

        def note(layer: LayerStacks, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            tokens, index, _ = layer.layer.routing(*arguments)
            for expert in range(layer.output.experts):
                chosen = (index == expert).any(-1) & counted[layer.path.partition(".")[0]]
                self._add(layer, expert, tokens[chosen])

        hooks = [
            self._model.get_submodule(each.path).register_forward_pre_hook(partial(note, each))
            for each in self._layers
        ]
        self._before_head: list[Tensor] = []
        hooks.append(
            self._model.get_output_embeddings().register_forward_pre_hook(
                lambda module, arguments: self._before_head.append(arguments[0].clone())
            )
        )
        losses = []
        for batch in self._batches:
            counted.update(batch.counted)
            losses.append(_cross_entropy(self._log_probabilities(batch), batch.targets))
        for hook in hooks:
            hook.remove()
        self._losses = torch.cat(losses)
        self.cross_entropy, self.cross_entropy_error = _mean(self._losses)

    def _add(self, layer: LayerStacks, expert: int, inputs: Tensor) -> None:
        products = []
        for stack in layer.inputs:
            self.sums[stack.name].add(expert, inputs)
            products.append(inputs @ self.original[stack.name][expert].T)
        self.sums[layer.output.name].add(expert, layer.hidden(products))

    def _log_probabilities(self, batch: Batch) -> Tensor:
        logits: Tensor = self._model(**batch.inputs, use_cache=False).logits
        return logits.log_softmax(-1)

    @torch.no_grad()
    def measure(self, path: Path) -> dict[str, Any]:
        """Measure a file; its weights stay in the model."""
        errors = {}
        with qmoe_format.open(path, memory_map=False) as file:
            for name, places in self._matrices.items():
                dtype = file.tensors[name].dtype
                for expert, place in enumerate(places):
                    stored = to_float32(file.read_expert(name, expert), dtype)
                    place.copy_(torch.from_numpy(stored))
                sums = self.sums[name]
                error = relative_error(self.original[name], torch.stack(places), sums.sums)
                errors[name] = error[sums.tokens >= sums.sums.shape[2]]
        return {**self._loss(), "output_error": _summary(errors)}

    def _loss(self) -> dict[str, float]:
        """Means per target token, with standard errors from the means of the windows."""
        head = self._model.get_output_embeddings()
        losses, divergences = [], []
        for batch, hidden in zip(self._batches, self._before_head, strict=True):
            found = self._log_probabilities(batch)
            original = head(hidden).log_softmax(-1)
            losses.append(_cross_entropy(found, batch.targets))
            pointwise = nn.functional.kl_div(found, original, reduction="none", log_target=True)
            divergences.append(pointwise.sum(-1).double().mean(1))
        loss = torch.cat(losses)
        means = {"cross_entropy": loss, "loss_gap": loss - self._losses}
        means["kl"] = torch.cat(divergences)
        figures: dict[str, float] = {}
        for name, windows in means.items():
            figures[name], figures[f"{name}_error"] = _mean(windows)
        return figures


def _matrices(model: nn.Module, layers: Sequence[LayerStacks]) -> dict[str, list[Tensor]]:
    """Views of the model's parameters, one per expert, by the names of the file's stacks."""
    parameters = dict(model.named_parameters())
    found: dict[str, list[Tensor]] = {}
    for each in layers:
        for matrix, stacks in (
            (each.layer.inputs, each.inputs),
            (each.layer.output, (each.output,)),
        ):
            members = [parameters[name].detach() for name in each.layer.members(matrix)]
            experts = members if len(members) > 1 else list(members[0])
            for part, stack in enumerate(stacks):  # one matrix may have gate above up
                found[stack.name] = [one.chunk(len(stacks))[part] for one in experts]
    return found


def _batches(tokenizer: Any, config: dict[str, Any], windows: int | None) -> Iterator[Batch]:
    special = torch.tensor(tokenizer.all_special_ids)

    def counted(ids: Tensor) -> Tensor:
        return ~torch.isin(ids, special).flatten()

    if config.get("is_encoder_decoder"):
        read_windows = runpy.run_path(str(DATA / "eval_span.py"))["windows"]
        corrupted = _spaced(list(read_windows(tokenizer, EVALUATION_TEXT)), windows)
        for first in range(0, len(corrupted), BATCH):
            pairs = zip(*corrupted[first : first + BATCH], strict=True)
            encoder, targets = (torch.from_numpy(np.stack(part)) for part in pairs)
            start = torch.full((len(targets), 1), config["decoder_start_token_id"])
            decoder = torch.cat([start, targets[:, :-1]], 1)
            yield Batch(
                {"input_ids": encoder, "decoder_input_ids": decoder},
                targets,
                {"encoder": counted(encoder), "decoder": counted(decoder)},
            )
        return
    ids: list[int] = []
    with EVALUATION_TEXT.open(encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
            ids.append(tokenizer.eos_token_id)
    whole = len(ids) // CAUSAL_WINDOW
    cut = torch.tensor(ids[: whole * CAUSAL_WINDOW]).view(whole, CAUSAL_WINDOW)
    chosen = torch.stack(_spaced(list(cut), windows))
    for first in range(0, len(chosen), BATCH):
        part = chosen[first : first + BATCH]
        inputs = part[:, :-1]
        yield Batch({"input_ids": inputs}, part[:, 1:], {"model": counted(inputs)})


def _spaced(items: list[Any], count: int | None) -> list[Any]:
    if count is None or count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]


def _cross_entropy(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """The mean of each window, float64."""
    return -log_probabilities.gather(-1, targets[..., None])[..., 0].double().mean(1)


def _mean(windows: Tensor) -> tuple[float, float]:
    """Mean and standard error."""
    return float(windows.mean()), float(windows.std()) / math.sqrt(len(windows))


def _summary(errors: dict[str, Tensor]) -> dict[str, Any]:
    """Over the matrices with at least as many evaluation tokens as columns."""
    every = torch.cat(list(errors.values()))
    kinds: dict[str, list[Tensor]] = {}
    for name, error in errors.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(error)
    mean = {kind: torch.cat(some) for kind, some in kinds.items()}
    return {
        "matrices": len(every),
        "geometric_mean": float(every.log().mean().exp()) if len(every) else None,
        "mean": {kind: float(some.mean()) if len(some) else None for kind, some in mean.items()},
    }
