"""Which tensors are experts: every layout that transformers loads, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from transformers import MixtralConfig

from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.checkpoints.expert_stacks import find_layers
from qmoe_format.checkpoints.families import expert_layers
from qmoe_format.checkpoints.model import build
from qmoe_format.checkpoints.name_map import NameMap
from qmoe_format.checkpoints.tensor_info import TensorInfo
from qmoe_format.errors import QMoEError
from tests import refusals
from tests.conftest import MIXTRAL, State, random_state, switch_config, write_checkpoint
from tests.tiny_models import changed, save_model

Change = Callable[[State], object]
Write = Callable[..., Path]
PREFIX = "encoder.block.1.layer.1.mlp.experts."
_TEXT = {
    "vocab_size": 32,
    "hidden_size": 4,
    "intermediate_size": 5,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "dtype": "float32",
}
GRANITE = _TEXT | {"architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe"}
GPT_OSS = _TEXT | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "head_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(config, change=edit_state, new_names=…)``."""

    def run(
        config: dict[str, Any], change: Change = lambda state: None, *, new_names: bool = False
    ) -> Path:
        state = random_state(config, new_names=new_names)
        change(state)
        return write_checkpoint(tmp_path / "checkpoint", state, config)

    return run


def refusal(folder: Path) -> str:
    return refusals.refusal(partial(open_checkpoint, folder), "checkpoint")


@pytest.mark.parametrize("new_names", [False, True])
@pytest.mark.parametrize(
    ("config", "first"), [(GRANITE, "input_linear"), (GPT_OSS, "experts.gate_up_proj")]
)
def test_experts_in_one_tensor(
    write: Write, config: dict[str, Any], first: str, new_names: bool
) -> None:
    state: State = {}
    with open_checkpoint(write(config, state.update, new_names=new_names)) as checkpoint:
        (layer,) = checkpoint.layers
        (inputs,), output = layer.inputs, layer.output
        assert ("gate_up_proj" if new_names else first) in inputs.name
        assert layer.stacks == checkpoint.stacks
        assert (inputs.experts, inputs.rows, inputs.columns) == (3, 10, 4)
        assert (output.experts, output.rows, output.columns) == (3, 4, 5)
        for stack in (inputs, output):
            whole = state[stack.name]
            assert stack.transposed is (whole.shape[1:] != (stack.rows, stack.columns))
            matrix = checkpoint.read_expert(stack, 2)
            assert torch.equal(matrix, whole[2].T if stack.transposed else whole[2])
            assert matrix.shape == (stack.rows, stack.columns)
        assert set(checkpoint.others) == state.keys() - {inputs.name, output.name}


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_old_names_and_new_ones(write: Write, prefix: str) -> None:
    """Also of a model that was saved without its head."""

    def rename(state: State) -> None:
        renamed = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        if not prefix:
            state.clear()
            state.update(renamed)

    read = []
    for new_names in (False, True):
        with open_checkpoint(write(MIXTRAL, rename, new_names=new_names)) as checkpoint:
            checkpoint.check_complete()
            (layer,) = checkpoint.layers
            assert layer.path == "model.layers.0.mlp.experts"
            inputs = [checkpoint.read_expert(stack, 1) for stack in layer.inputs]
            read.append([torch.cat(inputs), checkpoint.read_expert(layer.output, 1)])
            assert len(inputs) == (1 if new_names else 2)
            assert checkpoint.stacks[0].name.startswith(f"{prefix}layers.0.")
    for old, new in zip(*read, strict=True):
        assert torch.equal(old, new)


def test_gate_and_up_in_turns(tmp_path: Path) -> None:
    """Transformers sorts their rows."""
    read = []
    for original in (True, False):
        folder = save_model(tmp_path / f"{original}", "inkling2_text", original=original)
        with open_checkpoint(folder) as checkpoint:
            layer = checkpoint.layers[-1]
            assert layer.interleaved is original
            (inputs,) = layer.inputs
            matrix = checkpoint.read_expert(inputs, 1)
            read.append(torch.cat(list(layer.split_rows(matrix.T, 2)), -1))
    assert torch.equal(*read)


def test_matrices_that_transformers_transposes(tmp_path: Path) -> None:
    """It does so if only that gives them the model's shape."""
    folder = save_model(tmp_path / "new", "qwen3_vl_moe")
    published = changed(
        folder,
        tmp_path / "published",
        lambda state: state.update(
            {
                name: tensor.mT.contiguous()
                for name, tensor in state.items()
                if ".language_model." in name and tensor.ndim == 3
            }
        ),
    )
    with open_checkpoint(folder) as new, open_checkpoint(published) as old:
        for stack, transposed in zip(new.stacks, old.stacks, strict=True):
            assert (stack.transposed, transposed.transposed) == (False, True)
            assert (stack.rows, stack.columns) == (transposed.rows, transposed.columns)
            assert torch.equal(new.read_expert(stack, 1), old.read_expert(transposed, 1))


def test_names_of_both_kinds(write: Write) -> None:
    new = random_state(MIXTRAL, new_names=True)
    assert "there twice" in refusal(write(MIXTRAL, lambda state: state.update(new)))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
@pytest.mark.parametrize("new_names", [False, True])
def test_a_prefix_that_the_model_does_not_have(write: Write, prefix: str, new_names: bool) -> None:
    def change(state: State) -> None:
        for name in list(state):
            state[prefix + name] = state.pop(name)

    said = refusal(write(MIXTRAL, change, new_names=new_names))
    assert "none for 'model.layers.0.mlp.experts'" in said
    assert f"only for '{prefix}model.layers.0.mlp.experts'" in said


@pytest.mark.parametrize(
    ("config", "dtype"), [(MIXTRAL | {"dtype": "float16"}, "F16"), (MIXTRAL, "F32")]
)
def test_experts_of_several_dtypes_have_the_models(
    write: Write, config: dict[str, Any], dtype: str
) -> None:
    def change(state: State) -> None:
        name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
        state[name] = state[name].bfloat16()

    with open_checkpoint(write(config, change)) as checkpoint:
        assert {stack.dtype for stack in checkpoint.stacks} == {dtype}


def test_experts_of_several_dtypes_without_a_dtype_in_the_configuration(
    tmp_path: Path,
) -> None:
    state = random_state(switch_config())
    state[PREFIX + "expert_2.wi.weight"] = state[PREFIX + "expert_2.wi.weight"].half()
    config = switch_config()
    del config["dtype"]
    with open_checkpoint(write_checkpoint(tmp_path / "checkpoint", state, config)) as checkpoint:
        assert {stack.dtype for stack in checkpoint.stacks} == {"BF16"}


def remove(*names: str) -> Change:
    def change(state: State) -> None:
        for name in names:
            del state[PREFIX + name]

    return change


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        (["expert_1.wi.weight"], f"expert 1 of 4 is missing: there is no tensor '{PREFIX}expert_1"),
        (["expert_3.wo.weight"], f"expert 3 of 4 is missing: there is no tensor '{PREFIX}expert_3"),
        (["expert_0.wi.weight"], f"expert 0 of 4 is missing: there is no tensor '{PREFIX}expert_0"),
        ([f"expert_{e}.wo.weight" for e in range(4)], "incomplete: "),  # a whole stack
        ([f"expert_{e}.{m}.weight" for e in range(4) for m in ("wi", "wo")], "there are none for"),
    ],
)
def test_missing_experts(switch: Write, removed: list[str], said: str) -> None:
    message = refusal(switch(remove(*removed)))
    assert said in message
    assert PREFIX.removesuffix(".") in message


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (3, "shape [4, 6, 10], but by config.json experts are [3, 6, 10]"),
        (5, "expert 4 of 5 is missing"),
        (0, f"'{PREFIX}expert_0.wi.weight': looks like part of an expert"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_another_number_of_experts_than_the_model_has(switch: Write, count: int, said: str) -> None:
    assert said in refusal(switch(config={"num_experts": count}))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("expert_2.wi.weight", (6, 11), f"'{PREFIX}expert_2.wi.weight': [6, 11], but"),
        ("expert_2.wi.weight", (60,), f"'{PREFIX}expert_2.wi.weight': its shape is [60]"),
        ("expert_2.wi.weight", (0,), f"'{PREFIX}expert_2.wi.weight': its shape is [0]"),  # ZeRO-3
    ],
)
def test_an_expert_of_another_shape(
    switch: Write, name: str, shape: tuple[int, ...], said: str
) -> None:
    wrong = torch.zeros(shape, dtype=torch.bfloat16)
    assert said in refusal(switch(lambda state: state.update({PREFIX + name: wrong})))


@pytest.mark.parametrize(("rows", "columns"), [(7, 10), (6, 9), (10, 6)])
def test_experts_of_another_shape_than_the_model_has(
    switch: Write, rows: int, columns: int
) -> None:
    def change(state: State) -> None:
        for name in state:
            if name.endswith(".wi.weight") and ".experts." in name:
                state[name] = torch.zeros(rows, columns, dtype=torch.bfloat16)

    said = refusal(switch(change))
    assert f"'{PREFIX}wi' has shape [4, {rows}, {columns}]" in said
    assert "[4, 6, 10]" in said


def test_experts_of_a_dtype_that_is_no_float_type(switch: Write) -> None:
    def change(state: State) -> None:
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
def test_nothing_like_an_expert_is_left_as_it_is(switch: Write, name: str) -> None:
    folder = switch(lambda state: state.update({PREFIX + name: torch.zeros(6, 10)}))
    assert PREFIX + name in refusal(folder)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GRANITE, "block_sparse_moe.experts.2.gate_proj.weight"),
        (GRANITE, "block_sparse_moe.input_linear.weight_scale"),
        (GPT_OSS, "mlp.experts.gate_up_proj_blocks"),
        (GPT_OSS, "mlp.experts.0.up_proj.weight"),
        (GPT_OSS, "mlp.experts.up_proj_bias"),
    ],
)
def test_nothing_like_a_part_of_experts_is_left_as_it_is(
    write: Write, config: dict[str, Any], name: str
) -> None:
    name = f"model.layers.0.{name}"
    assert name in refusal(write(config, lambda state: state.update({name: torch.zeros(3, 4)})))


@pytest.mark.parametrize(
    ("config", "name", "shape", "said"),
    [
        (GRANITE, "block_sparse_moe.input_linear.weight", (2, 10, 4), "experts are [3, 10, 4]"),
        (GRANITE, "block_sparse_moe.input_linear.weight", (10, 4), "its shape is [10, 4]"),
        (GRANITE, "block_sparse_moe.input_linear.weight", None, "incomplete: "),
        (GPT_OSS, "mlp.experts.gate_up_proj", (3, 10, 4), "experts are [3, 10, 4]"),
        (GPT_OSS, "mlp.experts.down_proj", None, "incomplete: "),
    ],
)
def test_one_tensor_that_is_wrong(
    write: Write, config: dict[str, Any], name: str, shape: tuple[int, ...] | None, said: str
) -> None:
    def change(state: State) -> None:
        state.pop(f"model.layers.0.{name}")
        if shape:
            state[f"model.layers.0.{name}"] = torch.zeros(shape)

    message = refusal(write(config, change))
    assert said in message
    assert "model.layers.0." in message


def test_a_model_without_experts(write: Write) -> None:
    dense = {**_TEXT, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert "'llama' has no experts" in refusal(write(dense))


@pytest.mark.parametrize(
    "settings",
    [{}, {"quant_method": "mxfp4"}, {"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}],
)
def test_float_weights_beside_a_stale_quantization_config(
    switch: Write, settings: dict[str, Any]
) -> None:
    """The tensors decide."""
    with open_checkpoint(switch(config={"quantization_config": settings})) as checkpoint:
        checkpoint.check_complete()
        assert {stack.dtype for stack in checkpoint.stacks} == {"BF16"}
        assert not checkpoint.packed


@pytest.fixture(scope="module")
def names() -> NameMap:
    """Of a Mixtral."""
    return NameMap(build(MixtralConfig.from_dict(MIXTRAL)))


OLD = {name: tuple(tensor.shape) for name, tensor in random_state(MIXTRAL).items()}
EXPERTS = [name for name in OLD if ".experts." in name]


@given(data=st.data())
def test_experts_are_found_whole_or_not_at_all(names: NameMap, data: st.DataObject) -> None:
    """Whatever is missing, extra or in whatever order."""
    order = data.draw(st.permutations(list(OLD)))
    missing = data.draw(st.sets(st.sampled_from(list(OLD)), max_size=2))
    template = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    number, matrix = st.integers(0, 5), st.sampled_from(["w1", "w2", "w3", "w4"])
    extra = data.draw(st.lists(st.builds(template.format, number, number, matrix), max_size=2))
    shapes = {name: OLD[name] for name in order if name not in missing}
    shapes |= dict.fromkeys(extra, (6, 10))
    tensors = {name: TensorInfo(name, "F32", shape, 0) for name, shape in shapes.items()}
    whole = set(EXPERTS) <= shapes.keys() and not {*extra} - set(EXPERTS)
    if whole and all(shapes[name] == OLD[name] for name in EXPERTS):
        (layer,) = find_layers(names, list(expert_layers(names.model)), tensors, "F32")
        assert [stack.name.rpartition(".")[2] for stack in layer.inputs] == ["w1", "w3"]
        members = {stack.member(expert) for stack in layer.stacks for expert in range(3)}
        assert members == set(EXPERTS)
    else:
        with pytest.raises(QMoEError):
            find_layers(names, list(expert_layers(names.model)), tensors, "F32")
