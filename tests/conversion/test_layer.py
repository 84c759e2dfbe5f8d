"""A block's experts and their tokens; gate and up in one matrix are as if they were two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from safetensors.torch import save_file
from torch import Tensor

from qmoe_format.calibration.activations import Routed, Rows
from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.checkpoints.wiring import wiring
from qmoe_format.conversion.block_experts import Layer

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 3, 8, 5, 40


def checkpoint(folder: Path, model_type: str, experts: dict[str, Tensor]) -> Any:
    folder.mkdir()
    (folder / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    save_file(
        {f"0.block_sparse_moe.{name}": each for name, each in experts.items()},
        folder / "model.safetensors",
    )
    return open_checkpoint(folder)


@pytest.fixture
def layers(tmp_path: Path) -> tuple[Layer, Layer]:
    """Of Mixtral and of Granite, with the same weights and tokens."""
    torch.manual_seed(0)
    gate, up = torch.randn(2, EXPERTS, INTERMEDIATE, HIDDEN)
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE)
    separate = {
        f"experts.{e}.{name}.weight": matrices[e].clone()
        for e in range(EXPERTS)
        for name, matrices in (("w1", gate), ("w2", down), ("w3", up))
    }
    fused = {"input_linear.weight": torch.cat([gate, up], 1), "output_linear.weight": down}

    def written(name: str, rows: Tensor) -> Rows:
        file = Rows(tmp_path / f"{name}.rows", TOKENS, rows.shape[1], rows.dtype)
        with file.writing() as append:
            append(rows)
        return file

    routed = Routed(
        written("inputs", torch.randn(TOKENS, HIDDEN)),
        written("experts", torch.rand(TOKENS, EXPERTS).topk(2).indices),
        written("weights", torch.rand(TOKENS, 2)),
        torch.rand(TOKENS) > 0.3,
        EXPERTS,
    )

    def layer(opened: Any, head: str) -> Layer:
        norms = torch.arange(1.0, TOKENS + 1)[:, None]
        return Layer(
            opened,
            head,
            wiring(opened.config),
            routed,
            token_cap=100.0,
            norms=norms,
            device="cpu",
            threads=1,
        )

    return (
        layer(checkpoint(tmp_path / "s", "mixtral", separate), "0.block_sparse_moe.experts"),
        layer(checkpoint(tmp_path / "f", "granitemoe", fused), "0.block_sparse_moe"),
    )


def test_one_matrix_is_weighed_like_two(layers: tuple[Layer, Layer]) -> None:
    everyone = range(EXPERTS)
    separate, fused = (layer.statistics(layer.weights(everyone), everyone) for layer in layers)
    both = [separate["w1"].row_importance, separate["w3"].row_importance]
    assert not both[0].allclose(both[1])
    torch.testing.assert_close(fused["input_linear"].row_importance, torch.cat(both, 1))
    torch.testing.assert_close(fused["input_linear"].sums, separate["w3"].sums)
    for field in ("sums", "tokens", "row_importance"):
        torch.testing.assert_close(
            getattr(fused["output_linear"], field), getattr(separate["w2"], field)
        )


def test_outputs_and_energies(layers: tuple[Layer, Layer]) -> None:
    everyone = range(EXPERTS)
    returned, energies = [], []
    for layer in layers:
        outputs = torch.zeros(TOKENS, HIDDEN)
        layer.add_outputs(layer.weights(everyone), everyone, outputs)
        returned.append(outputs)
        energies.append(layer.energies(layer.weights(everyone), everyone))
    torch.testing.assert_close(*returned)
    assert returned[0].abs().min() > 0
    separate, fused = energies
    torch.testing.assert_close(fused["output_linear"], separate["w2"])
    both = torch.cat([separate["w1"], separate["w3"]], 1)
    torch.testing.assert_close(fused["input_linear"], both)


def everything(layer: Layer) -> list[Tensor]:
    """All that is computed from the tokens of all experts."""
    everyone = range(EXPERTS)
    weights, outputs = layer.weights(everyone), torch.zeros(TOKENS, HIDDEN)
    layer.add_outputs(weights, everyone, outputs)
    return [
        outputs,
        *layer.energies(weights, everyone).values(),
        *(
            tensor
            for found in layer.statistics(weights, everyone).values()
            for tensor in (found.sums, found.tokens, found.row_importance)
        ),
    ]


def test_a_few_tokens_at_a_time(
    layers: tuple[Layer, Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = everything(layers[0])
    monkeypatch.setattr("qmoe_format.conversion.block_experts.CHUNK_ELEMENTS", 1)
    monkeypatch.setattr("qmoe_format.conversion.block_experts.CHUNK_TOKENS", 3)
    for whole, pieces in zip(at_once, everything(layers[0]), strict=True):
        torch.testing.assert_close(pieces, whole)


def test_outputs_are_the_sum_over_a_tokens_experts(layers: tuple[Layer, Layer]) -> None:
    layer = layers[0]
    routed, weights = layer._routed, layer.weights(range(EXPERTS))
    wanted = torch.zeros(TOKENS, HIDDEN)
    for token, (chosen, gates) in enumerate(zip(routed.experts, routed.weights, strict=True)):
        x = routed.inputs[token]
        for expert, gate in zip(chosen.tolist(), gates, strict=True):
            w1, w2, w3 = (weights[name][expert] for name in ("w1", "w2", "w3"))
            wanted[token] += gate * (w2 @ (torch.nn.functional.silu(w1 @ x) * (w3 @ x)))
    torch.testing.assert_close(everything(layer)[0], wanted)


def test_the_cap_takes_tokens_of_all_of_the_text(
    layers: tuple[Layer, Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layers[0]
    # 100 times as many as an expert has on the average: two a token, of those that count.
    assert layer._most == -(-100 * 2 * int(layer._routed.counted.sum()) // EXPERTS)
    every = [layer.tokens(expert) for expert in range(EXPERTS)]
    monkeypatch.setattr(layer, "_most", 5)
    for expert, before in enumerate(every):
        spread = torch.arange(5) * len(before[0]) // 5
        for kept, all_of_them in zip(layer.tokens(expert), before, strict=True):
            assert kept.equal(all_of_them[spread])


def test_groups_keep_all_threads_busy(
    layers: tuple[Layer, Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layers[0]
    assert layer.elements == HIDDEN * INTERMEDIATE + HIDDEN**2
    assert layer.abreast == layer.workers == layer.threads == 1
    monkeypatch.setattr(layer, "fitting", 1)
    monkeypatch.setattr(layer, "abreast", 2)
    assert [len(group) for group in layer.groups()] == [2, 1]
    monkeypatch.setattr(layer, "abreast", 1)
    assert [len(group) for group in layer.groups()] == [1, 1, 1]
