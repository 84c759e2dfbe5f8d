"""Reading Hugging Face folders: what is found in good ones, how bad ones are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qmoe_format.errors import QMoEError

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from safetensors.torch import load_file, save_file

from qmoe_format.checkpoints import Checkpoint, check_layers, open_checkpoint
from qmoe_format.checkpoints.torch_dtypes import TORCH_DTYPES, to_storage
from qmoe_format.checkpoints.weight_files import Shard, open_shard
from qmoe_format.dtypes import STORAGE
from tests.conftest import write_checkpoint

Make = Callable[..., Path]
PREFIX = "encoder.block.1.layer.1.mlp.experts."


def refusal(folder: Path) -> str:
    with pytest.raises(QMoEError) as caught:
        open_checkpoint(folder)
    assert caught.value.code == "checkpoint"
    return str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_and_stacks_of_every_layout(switch: Make, kind: str, shards: int) -> None:
    kept: dict[str, Any] = {}
    folder = switch(kept.update, kind=kind, shards=shards)
    with open_checkpoint(folder) as checkpoint:
        assert [stack.name for stack in checkpoint.stacks] == [PREFIX + "wi", PREFIX + "wo"]
        wi, wo = checkpoint.stacks
        assert (wi.experts, wi.rows, wi.columns, wi.dtype) == (4, 6, 10, "BF16")
        assert wi.members == PREFIX + "expert_{}.wi.weight"
        assert (wo.rows, wo.columns) == (10, 6)
        assert sorted(checkpoint.others) == sorted(n for n in kept if ".experts." not in n)
        assert list(checkpoint.tensors) == sorted(kept)
        for name, tensor in kept.items():
            assert torch.equal(checkpoint.read(name), tensor)
        for e in range(4):
            assert torch.equal(
                checkpoint.read_expert(wi, e), kept[PREFIX + f"expert_{e}.wi.weight"]
            )
        names = [path.name for path in checkpoint.attachments]
        assert names == ["config.json", "tokenizer_config.json"]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (3, "config.json: 'num_layers' is 3, but there are no tensors encoder.block.2.*"),
        (10**12, "no tensors encoder.block.2.*"),
        (1, "'num_layers' is 1, but there are tensors encoder.block.1.*"),
        (0, "'num_layers' is 0, not a positive number"),
        ("2", "'num_layers' is '2', not a positive number"),
        (True, "'num_layers' is True, not a positive number"),
    ],
)
def test_another_number_of_layers(switch: Make, layers: object, said: str) -> None:
    config = {"model_type": "switch_transformers", "num_experts": 4, "num_layers": layers}
    assert said in refusal(switch(config=config))


def test_a_layer_in_the_middle_is_missing() -> None:
    names = ["model.layers.0.x", "model.layers.2.x", "model.norm.weight"]
    with pytest.raises(QMoEError, match=r"no tensors model\.layers\.1\."):
        check_layers({"model_type": "mixtral", "num_hidden_layers": 3}, names)
    check_layers({"model_type": "mixtral"}, names)
    config = {"model_type": "glm4_moe", "num_hidden_layers": 1, "num_nextn_predict_layers": 2}
    check_layers(config, ["model.layers.0.x", "model.layers.2.x"])


def test_mixtral(mixtral: Path) -> None:
    with open_checkpoint(mixtral) as checkpoint:
        prefix = "model.layers.0.block_sparse_moe.experts."
        names = [stack.name for stack in checkpoint.stacks]
        assert names == [prefix + matrix for matrix in ("w1", "w2", "w3")]
        assert {stack.experts for stack in checkpoint.stacks} == {3}
        assert checkpoint.stacks[0].member(2) == prefix + "2.w1.weight"


@pytest.mark.parametrize(
    ("folder", "stacks", "experts"), [("switch-mini", 8, 16), ("mixtral-mini", 12, 8)]
)
def test_real_checkpoints(shared_data: Path, folder: str, stacks: int, experts: int) -> None:
    with open_checkpoint(shared_data / folder) as checkpoint:
        assert len(checkpoint.stacks) == stacks
        assert {stack.experts for stack in checkpoint.stacks} == {experts}
        assert not any(".experts." in name for name in checkpoint.others)
        assert "lm_head.weight" not in checkpoint.tensors  # tied: not on disk, not invented


def test_reading_much_drops_the_maps(switch: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("safetensors", "bin"):
        folder = switch(kind=kind, name=kind)
        with open_checkpoint(folder) as opened:
            config, tensors = opened.config, opened.tensors
            shard = open_shard(*opened.weight_files)
        released: list[Shard] = []
        monkeypatch.setattr(shard, "release", partial(released.append, shard))
        with Checkpoint(folder, config, [shard], tensors, release_after=500) as checkpoint:
            first = checkpoint.read("shared.weight")
            before = first.clone()
            for name in checkpoint.tensors:
                checkpoint.read(name)
            assert released
            assert torch.equal(first, before)  # a view outlives its handle


def test_every_element_type_keeps_its_bits(tmp_path: Path, switch: Make) -> None:
    bits = torch.arange(64, dtype=torch.uint8)
    extra = {
        f"extra.{name}": (bits % 2).bool() if name == "BOOL" else bits.view(dtype).clone()
        for name, dtype in TORCH_DTYPES.items()
    } | {"extra.scalar": torch.tensor(3.0), "extra.empty": torch.zeros(0, 5)}
    with open_checkpoint(switch(lambda state: state.update(extra))) as checkpoint:
        for name in TORCH_DTYPES:
            array = to_storage(checkpoint.read(f"extra.{name}"))
            assert checkpoint.tensors[f"extra.{name}"].dtype == name
            assert array.dtype == STORAGE[name]
            assert array.tobytes() == extra[f"extra.{name}"].view(torch.uint8).numpy().tobytes()
        assert to_storage(checkpoint.read("extra.scalar")).shape == ()
        assert to_storage(checkpoint.read("extra.empty")).shape == (0, 5)


def test_all_small_files_travel_and_no_weights(switch: Make) -> None:
    folder = switch(shards=2)
    for name in (
        "tokenizer.json",
        "spiece.model",
        "merges.txt",
        "chat_template.jinja",
        "README.md",
    ):
        (folder / name).write_text("x")
    (folder / ".hidden.json").write_text("x")
    (folder / "directory.json").mkdir()
    with open_checkpoint(folder) as checkpoint:
        assert [path.name for path in checkpoint.attachments] == [
            "chat_template.jinja",
            "config.json",
            "merges.txt",
            "spiece.model",
            "tokenizer.json",
            "tokenizer_config.json",
        ]


def test_a_name_that_cannot_be_attached(switch: Make) -> None:
    folder = switch()
    (folder / "my notes.txt").write_text("x")
    assert "my notes.txt" in refusal(folder)


def test_a_huge_text_file_is_no_tokenizer(switch: Make) -> None:
    folder = switch()
    with (folder / "corpus.txt").open("wb") as file:
        file.truncate((1 << 28) + 1)
    assert "corpus.txt" in refusal(folder)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(QMoEError) as caught:
        open_checkpoint(tmp_path / "nowhere")
    assert caught.value.code == "not-found"


@pytest.mark.parametrize(
    "config", [{"model_type": "llama"}, {}, {"model_type": None}, {"model_type": ["mixtral"]}]
)
def test_unknown_family(switch: Make, config: dict[str, Any]) -> None:
    message = refusal(switch(config=config))
    assert repr(config.get("model_type")) in message
    assert "glm4_moe, gpt_oss, granitemoe, mixtral, olmoe" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe", '{"a":' * 100_000])
def test_config_that_is_no_json(switch: Make, text: str) -> None:
    folder = switch()
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(folder)


def test_no_config(switch: Make) -> None:
    folder = switch()
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


def test_no_weights(switch: Make) -> None:
    folder = switch()
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_missing_shard(switch: Make, kind: str) -> None:
    folder = switch(kind=kind, shards=3)
    victim = next(folder.glob("*-00002-of-00003.*"))
    victim.unlink()
    assert victim.name in refusal(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0, 5, 100, -1, -100])
def test_truncated_shard(switch: Make, kind: str, keep: int) -> None:
    folder = switch(kind=kind, shards=3)
    victim = next(folder.glob("*-00002-of-00003.*"))
    victim.write_bytes(victim.read_bytes()[:keep])
    assert victim.name in refusal(folder)


def test_shard_without_a_tensor_of_the_index(switch: Make) -> None:
    folder = switch(shards=2)
    path = folder / "model-00001-of-00002.safetensors"
    state = load_file(path)
    del state["shared.weight"]
    save_file(state, path)
    assert "shared.weight" in refusal(folder)


@pytest.mark.parametrize("shard", [1, 2])
def test_tensor_in_two_shards(switch: Make, shard: int) -> None:
    folder = switch(shards=2)
    path = folder / f"model-{shard:05}-of-00002.safetensors"
    other = load_file(folder / f"model-{3 - shard:05}-of-00002.safetensors")
    name = next(name for name in other if ".experts." not in name)
    save_file(load_file(path) | {name: torch.zeros(3)}, path)
    assert name in refusal(folder)


@pytest.mark.parametrize(
    "weight_map",
    [None, {}, [], {"a": 1}, {"a": "../model.safetensors"}, {"a": "config.json"}, {"a": ".."}],
)
def test_broken_index(switch: Make, weight_map: object) -> None:
    folder = switch(shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "index.json" in refusal(folder)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"model": {"a": torch.zeros(2)}}, {1: 2}])
def test_bin_that_is_no_state_dict(switch: Make, content: object) -> None:
    folder = switch(kind="bin")
    torch.save(content, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder)


def test_bin_with_code_in_it_is_not_run(switch: Make, tmp_path: Path) -> None:
    folder = switch(kind="bin")
    torch.save({"a": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder)
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_bin_of_the_old_kind_is_refused_with_advice(switch: Make) -> None:
    folder = switch(kind="bin")
    path = folder / "pytorch_model.bin"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    assert "save the model as safetensors" in refusal(folder)


def remove(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for name in names:
            del state[PREFIX + name]

    return change


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        (["expert_1.wi.weight"], "expert_1.wi.weight"),  # a hole
        (["expert_3.wo.weight"], "expert_3.wo.weight"),  # fewer than the config says
        (["expert_0.wi.weight"], "expert_0.wi.weight"),
        ([f"expert_{e}.wo.weight" for e in range(4)], "expert_0.wo.weight"),  # a whole stack
        ([f"expert_{e}.{m}.weight" for e in range(4) for m in ("wi", "wo")], "no expert weights"),
    ],
)
def test_missing_experts(switch: Make, removed: list[str], named: str) -> None:
    assert named in refusal(switch(remove(*removed)))


def test_a_layer_with_a_router_and_no_experts(switch: Make) -> None:
    name = "encoder.block.3.layer.1.mlp.router.classifier.weight"
    message = refusal(switch(lambda state: state.update({name: torch.zeros(4, 10)})))
    assert "encoder.block.3.layer.1.mlp.experts.expert_0.wi.weight" in message


def test_last_expert_missing_and_no_count_in_the_config(switch: Make) -> None:
    folder = switch(
        remove("expert_3.wi.weight", "expert_3.wo.weight"),
        config={"model_type": "switch_transformers"},
    )
    assert "expert 3 of 4 is missing" in refusal(folder)


def test_more_experts_than_the_config_says(switch: Make) -> None:
    config = {"model_type": "switch_transformers", "num_experts": 3}
    assert "num_experts = 3" in refusal(switch(config=config))
    del_router = "encoder.block.1.layer.1.mlp.router.classifier.weight"
    folder = switch(lambda state: state.pop(del_router), config=config)
    assert "there are 4 experts" in refusal(folder)


@pytest.mark.parametrize("count", [0, -1, "16", True, [4], 4.0])
def test_a_count_of_experts_that_is_not_a_number(switch: Make, count: object) -> None:
    config = {"model_type": "switch_transformers", "num_experts": count}
    assert "num_experts" in refusal(switch(config=config))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("expert_2.wi.weight", torch.zeros(6, 11, dtype=torch.bfloat16)),  # another shape
        ("expert_2.wi.weight", torch.zeros(6, 10)),  # another type
        ("expert_2.wi.weight", torch.zeros(60, dtype=torch.bfloat16)),  # no matrix
    ],
)
def test_unequal_experts(switch: Make, name: str, tensor: Any) -> None:
    assert PREFIX + name in refusal(switch(lambda state: state.update({PREFIX + name: tensor})))


def test_experts_that_are_no_matrices(switch: Make) -> None:
    def change(state: dict[str, Any]) -> None:
        for name in state:
            if name.endswith("wi.weight"):
                state[name] = state[name].flatten()

    assert "expert_0.wi.weight': its shape is [60]" in refusal(switch(change))


def test_experts_that_are_quantized_already(switch: Make) -> None:
    def change(state: dict[str, Any]) -> None:
        for name in state:
            if ".experts." in name:
                state[name] = state[name].to(torch.float8_e4m3fn)

    assert "F8_E4M3" in refusal(switch(change))


@pytest.mark.parametrize(
    "name",
    [
        "expert_0.wi.bias",
        "expert_0.wi.weight_scale_inv",
        "expert_04.wi.weight",
        "expert_0.wg.weight",
        "gate_up_proj",
        "expert_99999999999999999999.wi.weight",
    ],
)
def test_nothing_like_an_expert_is_left_as_it_is(switch: Make, name: str) -> None:
    folder = switch(lambda state: state.update({PREFIX + name: torch.zeros(6, 10)}))
    assert PREFIX + name in refusal(folder)


def fused(tmp_path: Path, model_type: str, *shapes: tuple[str, tuple[int, ...]]) -> Path:
    """A checkpoint of zeros of a family that keeps the experts of a layer in one tensor."""
    config = {"model_type": model_type, "num_local_experts": 3}
    state = {f"model.layers.0.{name}": torch.zeros(shape) for name, shape in shapes}
    return write_checkpoint(tmp_path / "fused", state, config)


GRANITE = [
    ("block_sparse_moe.router.layer.weight", (3, 4)),
    ("block_sparse_moe.input_linear.weight", (3, 10, 4)),
    ("block_sparse_moe.output_linear.weight", (3, 4, 5)),
]
GPT_OSS = [
    ("mlp.router.weight", (3, 4)),
    ("mlp.router.bias", (3,)),
    ("mlp.experts.gate_up_proj", (3, 4, 10)),
    ("mlp.experts.gate_up_proj_bias", (3, 10)),
    ("mlp.experts.down_proj", (3, 5, 4)),
    ("mlp.experts.down_proj_bias", (3, 4)),
]


@pytest.mark.parametrize(
    ("model_type", "shapes", "first"),
    [("granitemoe", GRANITE, "input_linear"), ("gpt_oss", GPT_OSS, "gate_up_proj")],
)
def test_experts_in_one_tensor(tmp_path: Path, model_type: str, shapes: Any, first: str) -> None:
    with open_checkpoint(fused(tmp_path, model_type, *shapes)) as checkpoint:
        found = {stack.matrix: stack for stack in checkpoint.stacks}
        assert len(found) == 2
        assert found[first].name in checkpoint.tensors
        assert (found[first].experts, found[first].rows, found[first].columns) == (3, 10, 4)
        for stack in checkpoint.stacks:
            assert checkpoint.read_expert(stack, 2).shape == (stack.rows, stack.columns)
            assert stack.name not in checkpoint.others
        assert len(checkpoint.others) == len(shapes) - 2


@pytest.mark.parametrize(
    ("model_type", "shapes", "changed", "said"),
    [
        ("granitemoe", GRANITE, {1: (2, 10, 4)}, "there are 2 experts"),
        ("granitemoe", GRANITE, {1: (10, 4)}, "its shape is [10, 4]"),
        ("granitemoe", GRANITE, {1: None}, "there is no tensor 'model.layers.0.block_sparse_moe.i"),
        ("granitemoe", GRANITE, {1: None, 2: None}, "no expert weights found"),
        ("granitemoe", GRANITE, {0: (4, 4)}, "the router beside"),
        ("gpt_oss", GPT_OSS, {2: None}, "there is no tensor 'model.layers.0.mlp.experts.gate_up_"),
    ],
)
def test_one_tensor_that_is_wrong(
    tmp_path: Path, model_type: str, shapes: Any, changed: dict[int, Any], said: str
) -> None:
    changed_shapes = [
        (name, changed.get(number, shape)) for number, (name, shape) in enumerate(shapes)
    ]
    kept = [(name, shape) for name, shape in changed_shapes if shape is not None]
    assert said in refusal(fused(tmp_path, model_type, *kept))


@pytest.mark.parametrize(
    ("model_type", "shapes", "name"),
    [
        ("granitemoe", GRANITE, "block_sparse_moe.input_linear.weight_scale"),
        ("granitemoe", GRANITE, "block_sparse_moe.input_linear_bias"),
        ("granitemoe", GRANITE, "block_sparse_moe.experts.gate_up_proj"),
        ("gpt_oss", GPT_OSS, "mlp.experts.gate_up_proj_blocks"),
        ("gpt_oss", GPT_OSS, "mlp.experts.0.up_proj.weight"),
        ("gpt_oss", GPT_OSS, "mlp.experts.up_proj_bias"),
    ],
)
def test_nothing_like_a_part_of_experts_is_left_as_it_is(
    tmp_path: Path, model_type: str, shapes: Any, name: str
) -> None:
    assert name in refusal(fused(tmp_path, model_type, *shapes, (name, (3, 4, 10))))


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "mxfp4"}, {"quant_method": "fp8"}, {}, "what?"]
)
def test_a_checkpoint_that_is_quantized_already(switch: Make, quantization: Any) -> None:
    config = {"model_type": "switch_transformers", "quantization_config": quantization}
    message = refusal(switch(config=config))
    assert "already quantized" in message
    if isinstance(quantization, dict) and quantization:
        assert quantization["quant_method"] in message


def test_names_need_no_torch() -> None:
    """``unpack`` has to know them."""
    program = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'safetensors', 'transformers'])\n"
        "import qmoe_format.export.unpacking\n"
        "from qmoe_format.checkpoints import family_for\n"
        "assert family_for({'model_type': 'gpt_oss'}).transposed"
    )
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)
