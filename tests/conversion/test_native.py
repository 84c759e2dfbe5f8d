"""Checkpoints whose weights are published in a quantized format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qmoe_format

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qmoe_format.checkpoints import Checkpoint, open_checkpoint
from qmoe_format.container.inspection import describe
from qmoe_format.quantize import RECIPES
from qmoe_format.runtime.loading import load_original
from tests.conftest import Run
from tests.tiny_models import load_model, save_model

IDS = torch.tensor([[5, 9, 3, 17, 4, 22, 8, 30]])
BLOCK = 24  # divides neither 64 nor 80


def rewrite(folder: Path, quantization: dict[str, Any], state: dict[str, Tensor]) -> None:
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def to_fp8(folder: Path) -> None:
    """Every linear layer in FP8 with a scale for each block, as DeepSeek-V3 is published."""

    def stored(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        if not name.endswith("proj.weight") or weight.ndim != 2:
            yield name, weight
            return
        rows, columns = (-(-side // BLOCK) for side in weight.shape)
        scale = weight.abs().max().float() / 448 * (1 + torch.rand(rows, columns))
        wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        codes = weight.float() / wide[: weight.shape[0], : weight.shape[1]]
        yield name, codes.to(torch.float8_e4m3fn)
        yield f"{name}_scale_inv", scale

    state = load_file(folder / "model.safetensors")
    made = (part for name, weight in state.items() for part in stored(name, weight))
    block = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    rewrite(folder, block, dict(made))


def to_mxfp4(folder: Path) -> None:
    """The experts as gpt-oss is published: two numbers in a byte, a power of two for 32."""
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16)).byte()
        state[f"{name}_scales"] = torch.randint(120, 124, (experts, rows, columns // 32)).byte()
    rewrite(folder, {"quant_method": "mxfp4"}, state)


@pytest.fixture(params=["fp8", "mxfp4"])
def native(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    if request.param == "fp8":
        to_fp8(folder := save_model(tmp_path / "model", "deepseek_v3"))
    else:
        to_mxfp4(folder := save_model(tmp_path / "model", "gpt_oss", intermediate_size=96))
    return folder


def original(folder: Path) -> dict[str, Tensor]:
    """The model's weights as they stand for, in float32."""
    state: dict[str, Tensor] = load_original(folder, torch.float32).state_dict()
    return state


def expert_names(checkpoint: Checkpoint) -> set[str]:
    return {
        matrix for each in checkpoint.layers for matrix in (each.layer.inputs, each.layer.output)
    }


def test_experts_are_rounded_from_what_they_stand_for(native: Path, tmp_path: Path) -> None:
    file = qmoe_format.convert(native, tmp_path / "m.qmoe", threads=1)
    with open_checkpoint(native) as checkpoint:
        experts, transposed = expert_names(checkpoint), checkpoint.layers[0].layer.transposed
    before, after = original(native), load_model(qmoe_format.unpack(file, tmp_path / "out"))
    for name, weights in after.state_dict().items():
        if name not in experts:
            assert weights.equal(before[name].bfloat16().float()), name
            continue
        matrices = before[name].mT if transposed else before[name]
        rounded = RECIPES["rtn"].quantize(matrices).weights.dequantize()
        assert weights.equal(rounded.mT if transposed else rounded), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_calibrated_and_compared_with_the_original(
    native: Path, converted: Callable[..., Path], qmoe: Run, tmp_path: Path
) -> None:
    file = converted(native, recipe="rd", rate_lambda=0.001, samples=8)
    model = qmoe_format.load_model(file, dtype=torch.float32)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        expected = load_original(native, torch.float32)(input_ids=IDS).logits
    # The coarsest part of the difference is ternary experts'; dense weights differ by bf16.
    assert 0 < (found - expected).square().mean() < 0.5 * expected.square().mean()
    text = tmp_path / "eval.jsonl"
    text.write_text(json.dumps({"text": "w1 w2 w3 w4 w5 w6"}) + "\n")
    done = qmoe("eval", file, "--text", text, "--against", native)
    assert done.code == 0, done.err
    assert "KL(original" in done.out


def test_sizes_are_those_of_the_checkpoint_as_it_came(
    native: Path, qmoe: Run, tmp_path: Path
) -> None:
    file = qmoe_format.convert(native, tmp_path / "m.qmoe", threads=1)
    stored = load_file(native / "model.safetensors")
    with open_checkpoint(native) as checkpoint, qmoe_format.open(file) as opened:
        members = {s.member(e) for s in checkpoint.stacks for e in range(s.experts)}
        parts = {part for name in members for part in checkpoint.packed[name].parts}
        report = describe(opened)
        form = checkpoint.packed[min(members)].format
    experts = report["totals"]["experts"]
    assert experts["source_bytes"] == sum(stored[part].nbytes for part in parts)
    bits = 8 * experts["source_bytes"] / experts["weights"]
    assert bits == pytest.approx(4.25) if form == "mxfp4" else 8 < bits < 8.2
    assert report["totals"]["file"]["source_bytes"] == sum(t.nbytes for t in stored.values())
    assert report["source_format"] == form
    said = qmoe("inspect", file).out
    assert "as it came" in said
    assert form in said


def test_what_is_no_expert_can_stay_as_it_is(tmp_path: Path, qmoe: Run) -> None:
    folder = save_model(tmp_path / "model", "deepseek_v3")
    to_fp8(folder)
    plain = qmoe_format.convert(folder, tmp_path / "plain.qmoe", threads=1)
    assert qmoe("convert", folder, tmp_path / "kept.qmoe", "--keep-native").code == 0
    assert qmoe("verify", "--model", tmp_path / "kept.qmoe").code == 0
    with qmoe_format.open(plain) as one, qmoe_format.open(tmp_path / "kept.qmoe") as other:
        weights = [describe(each)["totals"]["others"]["weights"] for each in (one, other)]
    assert weights[0] == weights[1]
    unpacked = qmoe_format.unpack(tmp_path / "kept.qmoe", tmp_path / "out")
    before = load_file(folder / "model.safetensors")
    after: dict[str, Tensor] = {}
    for shard in unpacked.glob("*.safetensors"):
        after |= load_file(shard)
    for name, tensor in before.items():
        if ".experts." in name:
            assert (name in after) == name.endswith("proj.weight")
        else:
            bits = after[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
            assert after[name].dtype == tensor.dtype
            assert bits[0].equal(bits[1]), name
    config = json.loads((unpacked / "config.json").read_text())["quantization_config"]
    assert config["weight_block_size"] == [BLOCK, BLOCK]
    assert config["modules_to_not_convert"] == ["model.layers.1.mlp.experts"]
    with open_checkpoint(unpacked) as checkpoint:
        checkpoint.check_complete()
    with torch.no_grad():
        logits = [
            qmoe_format.load_model(tmp_path / name)(input_ids=IDS).logits
            for name in (plain.name, "kept.qmoe")
        ]
    assert logits[0].equal(logits[1])


def test_kept_where_the_part_for_language_says_how_it_is_quantized(tmp_path: Path) -> None:
    to_fp8(folder := save_model(tmp_path / "model", "qwen3_vl_moe"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    file = qmoe_format.convert(folder, tmp_path / "m.qmoe", keep_native=True, threads=1)
    kept = json.loads((qmoe_format.unpack(file, tmp_path / "out") / "config.json").read_text())
    assert "quantization_config" not in kept
    experts = kept["text_config"]["quantization_config"]["modules_to_not_convert"]
    assert experts == [f"model.language_model.layers.{block}.mlp.experts" for block in range(2)]
    for name, weights in original(tmp_path / "out").items():
        if ".experts." not in name:
            assert weights.equal(original(folder)[name]), name


def test_what_config_json_does_not_mention_is_not_kept(
    tmp_path: Path, qmoe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older checkpoints of ModelOpt have a file of its own for that."""
    monkeypatch.setattr(f"{__name__}.BLOCK", 8)
    to_fp8(folder := save_model(tmp_path / "model", "deepseek_v3"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    done = qmoe("convert", folder, tmp_path / "m.qmoe", "--keep-native")
    assert done.code == 1
    assert "--keep-native" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert qmoe("convert", folder, tmp_path / "m.qmoe").code == 0


def test_a_dtype_of_codes_is_not_the_models(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "deepseek_v3")
    to_fp8(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float8_e4m3fn"}))
    file = qmoe_format.convert(folder, tmp_path / "m.qmoe", threads=1)
    assert qmoe_format.load_model(file).dtype == torch.bfloat16
    unpacked = qmoe_format.unpack(file, tmp_path / "out")
    assert json.loads((unpacked / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_stale_quantization_config_is_dropped(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "deepseek_v3")
    rewrite(folder, {"quant_method": "fp8"}, load_file(folder / "model.safetensors"))
    file = qmoe_format.convert(folder, tmp_path / "m.qmoe", threads=1)
    unpacked = qmoe_format.unpack(file, tmp_path / "out")
    assert "quantization_config" not in json.loads((unpacked / "config.json").read_text())


def test_a_format_that_is_not_known_is_refused_and_nothing_is_left(
    tmp_path: Path, qmoe: Run
) -> None:
    folder = save_model(tmp_path / "model", "mixtral")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    state[f"{name}.absmax"] = torch.ones(2)
    state[name] = torch.zeros(2048, 1, dtype=torch.uint8)
    rewrite(folder, {"quant_method": "bitsandbytes", "load_in_4bit": True}, state)
    done = qmoe("convert", folder, tmp_path / "m.qmoe")
    assert done.code == 1
    assert "bitsandbytes" in done.err
    shutil.rmtree(folder)
    assert not list(tmp_path.iterdir())
