"""What a model loses when other matrices take the place of its experts'.

Everything is computed in float32, per target token of a text:

    KL            of the original's and the changed model's distributions, in nats
    loss gap      difference of their cross-entropies, in nats
    top 1         share of the tokens for which both find the same one most likely
    output error  tr((W-Q) S (W-Q)^T) / tr(W S W^T) of each expert's matrix, where S is the sum of
                  x x^T over its inputs x in the original model, without special tokens

A causal model predicts each next token in windows of 257; an encoder-decoder fills in spans, see
``qmoe_format.calibration.spans``.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import qmoe_format
from benchmarks.report import DATA
from qmoe_format.calibration.sequences import (
    Batch,
    default_sequence_length,
    language_config,
    make_batches,
)
from qmoe_format.calibration.text import Chat, read_documents
from qmoe_format.checkpoints import LayerStacks, open_checkpoint
from qmoe_format.checkpoints.tokenizers import load_tokenizer
from qmoe_format.conversion.passes import BlockPasses
from qmoe_format.dtypes import to_float32
from qmoe_format.progress import Progress
from qmoe_format.quantize.hessian import Statistics, relative_error

MODELS = ("switch-mini", "mixtral-mini")  # folders in DATA
CALIBRATION_TEXT = DATA / "text" / "calibration.jsonl"
EVALUATION_TEXT = DATA / "text" / "eval.jsonl"
CAUSAL_WINDOW = 257


class Model:
    """A model of transformers in float32 whose experts' matrices can be replaced.

    Attributes:
        layers: those of its experts.
        matrices: views of its parameters, [rows, columns] of each expert, by the names of the
            stacks in a ``.qmoe`` file.
    """

    def __init__(self, folder: Path) -> None:
        self._config = language_config(json.loads((folder / "config.json").read_text()))
        self._seq2seq = bool(self._config.get("is_encoder_decoder"))
        self._tokenizer = load_tokenizer(folder)
        with open_checkpoint(folder) as checkpoint:
            kind: Any = type(checkpoint.model)
            self._model = kind.from_pretrained(folder, dtype=torch.float32).eval()
            self.layers = [layer for layer in checkpoint.layers if layer.runs]
        self._parameters = {name: each.detach() for name, each in self._model.named_parameters()}
        self.matrices: dict[str, list[Tensor]] = {}
        for layer in self.layers:
            if layer.interleaved:
                raise SystemExit(f"{folder}: gate and up take turns in {layer.inputs[0].name}")
            self._find(layer, layer.layer.inputs, [stack.name for stack in layer.inputs])
            self._find(layer, layer.layer.output, [layer.output.name])

    def _find(self, layer: LayerStacks, matrix: str, stacks: Sequence[str]) -> None:
        members = [self._parameters[name] for name in layer.layer.members(matrix)]
        for one in members if len(members) > 1 else members[0]:
            columns_first = one if layer.layer.transposed else one.T
            parts = [columns_first] if len(stacks) == 1 else layer.split_rows(columns_first, 2)
            for stack, part in zip(stacks, parts, strict=True):
                self.matrices.setdefault(stack, []).append(part.T)

    def replace(self, stack: str, expert: int, weights: NDArray[np.float32]) -> None:
        """Let a matrix be ``weights``, float32 ``[rows, columns]``."""
        self.matrices[stack][expert].copy_(torch.from_numpy(weights))

    def batches(self, documents: Iterable[str | Chat], **options: Any) -> list[Batch]:
        """``make_batches`` for this model."""
        return make_batches(self._tokenizer, self._config, documents, **options)

    def windows(self, documents: Iterable[str | Chat], count: int | None = None) -> list[Batch]:
        """Windows to evaluate the model on, one in a batch and all equally long.

        Args:
            documents: the text.
            count: how many, chosen at random; by default all.
        """
        length = default_sequence_length(self._config) if self._seq2seq else CAUSAL_WINDOW
        found = self.batches(
            documents,
            sequence_length=length,
            samples=count,
            batch_size=1,
            mask_special_tokens=True,
        )
        return [each for each in found if each.inputs.ids.shape[1] == length]

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """The predictions of ``targets``, float32 ``[windows, tokens, vocabulary]``."""
        self._batch = batch
        named = {"": batch.inputs} | ({"decoder_": batch.targets} if batch.targets else {})
        arguments = {f"{name}input_ids": tokens.ids for name, tokens in named.items()}
        arguments |= {f"{name}attention_mask": each.attended.long() for name, each in named.items()}
        logits: Tensor = self._model(**arguments, use_cache=False).logits
        return logits[:, :-1]

    @property
    def head(self) -> nn.Module:
        """What computes the logits from the last hidden states."""
        head: nn.Module = self._model.get_output_embeddings()
        return head

    @contextmanager
    def watched(self, receive: Callable[[str, int, Tensor], None]) -> Iterator[None]:
        """Pass on what each matrix is multiplied by, while the weights are the original ones.

        Args:
            receive: gets a stack's name, the number of an expert, and its counted inputs, float32
                ``[tokens, columns]``.
        """

        def pass_on(layer: LayerStacks, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            tokens, index = layer.layer.routing(*arguments)[:2]
            in_decoder = self._batch.targets is not None and "decoder" in layer.path.split(".")
            read = self._batch.targets if in_decoder else self._batch.inputs
            assert read is not None
            for expert in range(layer.output.experts):
                inputs = tokens[(index == expert).any(-1) & read.counted.flatten()]
                for stack in layer.inputs:
                    receive(stack.name, expert, inputs)
                receive(layer.output.name, expert, self._hidden(layer, expert, inputs))

        with ExitStack() as hooks:
            for layer in self.layers:
                module = self._model.get_submodule(layer.path)
                hooks.callback(module.register_forward_pre_hook(partial(pass_on, layer)).remove)
            yield

    def _hidden(self, layer: LayerStacks, expert: int, inputs: Tensor) -> Tensor:
        products = [inputs @ self.matrices[stack.name][expert].T for stack in layer.inputs]
        biases: Sequence[Tensor] = ()
        if layer.layer.biases:
            bias = self._parameters[layer.layer.biases[0]][expert]
            biases = layer.split_rows(bias, 2) if len(products) == 2 else [bias]
        return layer.hidden(products, biases)


def targets(batch: Batch) -> Tensor:
    """The tokens to predict, int64 ``[windows, tokens]``."""
    return (batch.targets or batch.inputs).ids[:, 1:]


class Original:
    """What a model says about a text before its matrices are replaced.

    Attributes:
        windows: of the text.
        cross_entropy: mean over the windows.
        cross_entropy_error: its standard error.
    """

    @torch.no_grad()
    def __init__(self, model: Model, windows: Sequence[Batch]) -> None:
        self._model, self.windows = model, windows
        self._before_head: list[Tensor] = []  # smaller than its outputs
        hook = model.head.register_forward_pre_hook(
            lambda _, arguments: self._before_head.append(arguments[0].clone())
        )
        losses = []
        for window in windows:
            logits = model.logits(window)
            losses.append(_cross_entropy(logits.log_softmax(-1), targets(window)))
        hook.remove()
        if not torch.allclose(model.head(self._before_head[-1])[:, :-1], logits, atol=1e-4):
            raise SystemExit("the model changes what its LM head returns")
        self._losses = torch.cat(losses)
        self.cross_entropy, self.cross_entropy_error = _mean(self._losses)

    @torch.no_grad()
    def compare(self, progress: Progress | None = None) -> dict[str, float]:
        """Means per target token with standard errors from the windows, as ``NAME_error``."""
        found: dict[str, list[Tensor]] = {name: [] for name in ("cross_entropy", "kl", "top1")}
        for number, (window, hidden) in enumerate(
            zip(self.windows, self._before_head, strict=True), 1
        ):
            changed = self._model.logits(window).log_softmax(-1)
            original = self._model.head(hidden)[:, :-1].log_softmax(-1)
            found["cross_entropy"].append(_cross_entropy(changed, targets(window)))
            pointwise = nn.functional.kl_div(changed, original, reduction="none", log_target=True)
            found["kl"].append(pointwise.sum(-1).double().mean(1))
            found["top1"].append((changed.argmax(-1) == original.argmax(-1)).double().mean(1))
            if progress:
                progress(number, len(self.windows))
        means = {name: torch.cat(windows) for name, windows in found.items()}
        means["loss_gap"] = means["cross_entropy"] - self._losses
        figures: dict[str, float] = {}
        for name, windows in means.items():
            figures[name], figures[f"{name}_error"] = _mean(windows)
        return figures


class Evaluation:
    """What the original model says about the evaluation text, and what its experts compute there.

    Attributes:
        text: the original's predictions.
        original: its matrices, float32 ``[experts, rows, columns]`` by stack.
        sums: S of each, and the number of tokens.
    """

    def __init__(self, model: Model, windows: Sequence[Batch]) -> None:
        """Run the original."""
        self._model = model
        self.original = {name: torch.stack(each) for name, each in model.matrices.items()}
        self.sums = {
            name: Statistics.zeros(len(weights), weights.shape[2])
            for name, weights in self.original.items()
        }
        with model.watched(lambda name, *inputs: self.sums[name].add(*inputs)):
            self.text = Original(model, windows)

    def measure(self, progress: Progress | None = None) -> dict[str, Any]:
        """Compare the model as it is now."""
        errors = {}
        for name, matrices in self._model.matrices.items():
            sums = self.sums[name]
            error = relative_error(self.original[name], torch.stack(matrices), sums.sums)
            errors[name] = error[sums.tokens >= sums.sums.shape[2]]
        return {**self.text.compare(progress), "output_error": _summary(errors)}


def read_text(path: Path) -> list[str | Chat]:
    """The documents of a file."""
    return [text for (text,) in read_documents(path)]


@contextmanager
def surveys_shared(folder: Path) -> Iterator[None]:
    """Survey a model and a text only once: the survey does not depend on the size asked for."""
    survey = BlockPasses.survey
    others = shutil.ignore_patterns("lock", "state.json", "*.rows")

    def shared(self: BlockPasses) -> Any:
        asked = self.work.load("state") | {"bits_per_weight": None}
        kept = folder / hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        kept.mkdir(exist_ok=True)
        shutil.copytree(kept, self.work.folder, dirs_exist_ok=True)
        found = survey(self)
        shutil.copytree(self.work.folder, kept, ignore=others, dirs_exist_ok=True)
        return found

    with mock.patch.object(BlockPasses, "survey", shared):
        yield


def load_experts(model: Model, path: Path) -> None:
    """Replace a model's matrices by those of a ``.qmoe`` file."""
    with qmoe_format.open(path, memory_map=False) as file:
        for name, matrices in model.matrices.items():
            dtype = file.tensors[name].dtype
            for expert in range(len(matrices)):
                model.replace(name, expert, to_float32(file.read_expert(name, expert), dtype))


def _cross_entropy(log_probabilities: Tensor, wanted: Tensor) -> Tensor:
    """The mean of each window, float64."""
    return -log_probabilities.gather(-1, wanted[..., None])[..., 0].double().mean(1)


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
