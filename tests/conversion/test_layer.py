"""Experts whose gate and up are one matrix are weighed as if they were two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from safetensors.torch import save_file
from torch import Tensor

from qmoe_format.calibration.buffer import Routed, Rows
from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.conversion.layer import Layer
from qmoe_format.families import wiring

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
