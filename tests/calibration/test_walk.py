"""Walking a model: what its blocks see is what they see in transformers' own forward."""

from __future__ import annotations

import errno
import gc
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_format.atomic_file import PartialFile

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MixtralConfig,
    SwitchTransformersConfig,
)

from qmoe_format.calibration.activations import RoutedTokens, RowFile
from qmoe_format.calibration.model_part import Block, ModelPart
from qmoe_format.calibration.sequences import Batch, Tokens
from qmoe_format.calibration.walk import Walk
from qmoe_format.checkpoints import Checkpoint, open_checkpoint
from qmoe_format.checkpoints.expert_layers import ExpertLayer
from qmoe_format.checkpoints.families import expert_layers
from qmoe_format.checkpoints.registry import UNCALIBRATED
from qmoe_format.conversion.block_experts import BlockExperts
from qmoe_format.conversion.parallel import Resources
from tests.refusals import refusal
from tests.tiny_models import (
    CONFIGS,
    WRAPPERS,
    add_prediction_layer,
    changed,
    load_model,
    save_model,
)

VOCABULARY = 50
SWITCH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_heads": 2,
    "num_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_decoder_layers": 3,
    "num_sparse_decoder_layers": 3,
    "num_experts": 4,
    "expert_capacity": 1,
    "router_bias": True,
    "tie_word_embeddings": False,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0,
}
MIXTRAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def make(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(1)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tied = SWITCH | {"tie_word_embeddings": True, "router_bias": False}
    return {
        "switch": make(folder / "switch", SwitchTransformersConfig(**SWITCH)),
        "switch-tied": make(folder / "tied", SwitchTransformersConfig(**tied), torch.bfloat16),
        "mixtral": make(folder / "mixtral", MixtralConfig(**MIXTRAL)),
    }


@pytest.fixture(params=["switch", "switch-tied", "mixtral"])
def checkpoint(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[Checkpoint]:
    with open_checkpoint(models[request.param]) as opened:
        yield opened


@pytest.fixture
def switch(models: dict[str, Path]) -> Iterator[Checkpoint]:
    with open_checkpoint(models["switch"]) as opened:
        yield opened


def random_tokens(sequences: int, length: int, seed: int) -> Tokens:
    """Sequences of different lengths, padded with token 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (sequences,), generator=generator)
    attended = torch.arange(length) < lengths[:, None]
    ids = torch.randint(1, VOCABULARY, (sequences, length), generator=generator) * attended
    return Tokens(ids, attended, attended & (ids > 5))


def random_batches(checkpoint: Checkpoint, length: int = 14) -> list[Batch]:
    targets = checkpoint.config.get("is_encoder_decoder", False)
    return [
        Batch(
            random_tokens(size, length - seed, seed),
            random_tokens(size, length // 2 + seed, seed + 10) if targets else None,
        )
        for seed, size in enumerate((3, 1, 4))
    ]


def experts_outputs(checkpoint: Checkpoint, block: Block, routed: RoutedTokens | None) -> Any:
    """The outputs of the original experts, as a conversion sums those of the compressed ones."""
    if routed is None or block.experts is None:
        return None
    outputs, every = routed.outputs(), range(block.experts.output.experts)
    experts = BlockExperts(checkpoint, block.experts, routed, Resources(1), token_cap=1)
    experts.add_outputs(experts.weights(every), every, outputs)
    return outputs


def step(walk: Walk, checkpoint: Checkpoint) -> RoutedTokens | None:
    """One block, with its original experts."""
    block = walk.blocks[walk.position]
    routed = walk.collect()
    walk.advance(experts_outputs(checkpoint, block, routed))
    return routed


def walk_to_the_end(checkpoint: Checkpoint, folder: Path) -> None:
    walk = Walk(checkpoint, random_batches(checkpoint), folder)
    walk.start()
    while walk.position < len(walk.blocks):
        step(walk, checkpoint)


class Reference:
    """Transformers' own forward over batches; padding is left out of what it has seen.

    Attributes:
        blocks: the hidden states [tokens, d] after each block.
        experts: what experts were given [tokens, d], by their path.
        encoded: what the decoder was given [tokens, d].
    """

    def __init__(self, checkpoint: Checkpoint, blocks: Iterable[str], batches: list[Batch]) -> None:
        self.blocks: dict[str, Tensor] = {}
        self.experts: dict[str, Tensor] = {}
        self.encoded = torch.empty(0)
        model = load_model(checkpoint.folder)
        for name in blocks:
            model.get_submodule(name).register_forward_hook(partial(self._after_block, name))
        for layer in expert_layers(model):
            layer.module.register_forward_pre_hook(partial(self._before_experts, layer))
        model = getattr(model, "thinker", model)  # that of Qwen3-Omni which reads text
        with torch.no_grad():
            for self.batch in batches:
                inputs, targets = self.batch.inputs, self.batch.targets
                arguments = {"input_ids": inputs.ids, "attention_mask": inputs.attended.long()}
                if targets:
                    arguments["decoder_input_ids"] = targets.ids
                    arguments["decoder_attention_mask"] = targets.attended.long()
                result = model(**arguments)
                if targets:
                    encoded = result.encoder_last_hidden_state[inputs.attended]
                    self.encoded = torch.cat([self.encoded.view(-1, encoded.shape[1]), encoded])

    def _saw(self, found: dict[str, Tensor], name: str, states: Tensor) -> None:
        tokens = self.batch.targets if name.startswith("decoder.") else self.batch.inputs
        assert tokens is not None
        rows = states.reshape(*tokens.ids.shape, -1)[tokens.attended]
        found[name] = torch.cat([found[name], rows]) if name in found else rows

    def _after_block(self, name: str, module: Any, arguments: Any, result: Any) -> None:
        self._saw(self.blocks, name, result[0] if isinstance(result, tuple) else result)

    def _before_experts(self, layer: ExpertLayer, module: Any, arguments: Any) -> None:
        self._saw(self.experts, layer.path, layer.routing(*arguments)[0])


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def assert_like_the_model(
    checkpoint: Checkpoint, batches: list[Batch], folder: Path, tolerance: float
) -> None:
    walk = Walk(checkpoint, batches, folder)
    reached = [block for block in walk.blocks if not block.experts or block.experts.runs]
    reference = Reference(checkpoint, [block.name for block in reached], batches)
    walk.start()
    assert [block.name for block in reached] == list(reference.blocks)
    assert {block.experts.path for block in reached if block.experts} == set(reference.experts)
    for block in reached:
        routed = step(walk, checkpoint)
        assert (routed is None) == (block.experts is None)
        if routed and block.experts:
            assert_near(routed.inputs, reference.experts[block.experts.path], tolerance)
        following = walk.blocks[walk.position :]
        if following and following[0].name == "decoder.block.0":
            encoded = RowFile(folder / "encoded.rows", *reference.encoded.shape)
            assert_near(encoded.mapped(), reference.encoded, tolerance)
        else:
            assert_near(walk.hidden(), reference.blocks[block.name], tolerance)


def test_every_block_sees_what_it_sees_in_the_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert_like_the_model(checkpoint, random_batches(checkpoint), tmp_path, 2e-6)


@pytest.mark.parametrize("model_type", sorted((CONFIGS | WRAPPERS).keys() - UNCALIBRATED))
def test_every_family(model_type: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", model_type, torch.float32)
    (tmp_path / "walk").mkdir()
    with open_checkpoint(folder) as checkpoint:
        batches = random_batches(checkpoint)
        assert_like_the_model(checkpoint, batches, tmp_path / "walk", 5e-6)


SHARING = {**CONFIGS["mistral_large4"]["text_config"], "kv_source_layers": [0, 0, 2]}


@pytest.mark.parametrize(
    ("model_type", "changes", "block"),
    [
        ("inkling2_text", {}, "model.layers.1"),  # reads what blocks before it have returned
        ("zaya", {}, "model"),  # returns what its router has computed
        ("mistral_large4", {"text_config": SHARING}, "model.language_model.layers.0"),
    ],
)
def test_blocks_that_hand_on_more_than_hidden_states(
    model_type: str,
    changes: dict[str, Any],
    block: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused even if it were not known of their types."""
    monkeypatch.setattr("qmoe_format.calibration.walk.check_calibrated", lambda model_type: None)
    folder = save_model(tmp_path / "model", model_type, torch.float32, **changes)

    with open_checkpoint(folder) as checkpoint:
        said = refusal(lambda: walk_to_the_end(checkpoint, tmp_path), "checkpoint")
    assert said.startswith(f"{block}: ")


def test_layers_that_the_model_does_not_run(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "deepseek_v3", torch.float32)
    add_prediction_layer(folder)
    (tmp_path / "walk").mkdir()
    with open_checkpoint(folder) as checkpoint:
        batches = random_batches(checkpoint)
        walk = Walk(checkpoint, batches, tmp_path / "walk")
        beyond = "model.layers.2.mlp.experts"
        names = [block.name for block in walk.blocks]
        assert names == ["model.layers.0", "model.layers.1", beyond]
        walk.start()
        for _ in range(2):
            step(walk, checkpoint)
        end = walk.hidden().clone()
        assert walk.blocks[2].experts
        assert walk.blocks[2].experts.path == beyond
        for again in (walk, Walk(checkpoint, batches, tmp_path / "walk")):
            again.start(2)
            routed = step(again, checkpoint)
            assert routed
            assert (len(routed.inputs), len(routed.counted)) == (0, 0)
            assert all(len(routed.tokens_of(expert)[0]) == 0 for expert in range(6))
            assert again.position == 3
            assert again.hidden().equal(end)


def test_blocks_that_are_done_keep_no_memory(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "mixtral", torch.float32, num_hidden_layers=6)
    (tmp_path / "walk").mkdir()

    def alive() -> int:
        gc.collect()
        tensors = (each for each in gc.get_objects() if type(each) is Tensor)
        return sum(each.nbytes for each in tensors if each.device.type == "cpu")

    with open_checkpoint(folder) as checkpoint:
        walk = Walk(checkpoint, random_batches(checkpoint), tmp_path / "walk")
        walk.start()
        found = []
        for _ in walk.blocks:
            step(walk, checkpoint)
            found.append(alive())
    assert found[1:] == [found[0]] * 5


@pytest.mark.parametrize("name", ["switch-mini", "mixtral-mini"])
def test_real_models(name: str, shared_data: Path, tmp_path: Path) -> None:
    with open_checkpoint(shared_data / name) as checkpoint:
        assert_like_the_model(checkpoint, random_batches(checkpoint, 40), tmp_path, 1e-5)


def test_what_is_routed_has_the_tokens_in_order(checkpoint: Checkpoint, tmp_path: Path) -> None:
    batches = random_batches(checkpoint)
    walk = Walk(checkpoint, batches, tmp_path)
    walk.start()
    for block in walk.blocks:
        tokens = [b.targets if block.name.startswith("decoder.") else b.inputs for b in batches]
        counted = torch.cat([part.counted[part.attended] for part in tokens if part])
        if routed := step(walk, checkpoint):
            assert routed.counted.equal(counted)
            assert routed.inputs.shape == (len(counted), 16)
            assert routed.experts.shape == routed.weights.shape
            assert (routed.experts >= 0).all()  # expert_capacity is 1, and is not to count here
            if block.name.startswith("model."):
                torch.testing.assert_close(routed.weights.sum(1), torch.ones(len(counted)))


def alone(tokens: Tokens | None, number: int) -> Any:
    """One sequence of a batch, without padding."""
    if tokens is None:
        return None
    real = tokens.attended[number]
    parts = (tokens.ids, tokens.attended, tokens.counted)
    return Tokens(*(part[number, real][None] for part in parts))


def test_neither_padding_nor_other_sequences_matter(checkpoint: Checkpoint, tmp_path: Path) -> None:
    batches = random_batches(checkpoint)
    single = [
        Batch(alone(batch.inputs, number), alone(batch.targets, number))
        for batch in batches
        for number in range(len(batch.inputs.ids))
    ]
    ends = []
    for folder, some in ((tmp_path / "together", batches), (tmp_path / "alone", single)):
        folder.mkdir()
        walk = Walk(checkpoint, some, folder)
        walk.start()
        for _ in walk.blocks:
            step(walk, checkpoint)
        ends.append(walk.hidden())
    assert_near(ends[0], ends[1], 1e-5)


def test_a_walk_goes_on_where_another_stopped(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Also where it was killed after a block was done, but before that had been noted."""
    batches = random_batches(checkpoint)
    first = Walk(checkpoint, batches, tmp_path)
    first.start()
    for position in range(len(first.blocks)):
        before = first.hidden().clone()
        routed = step(first, checkpoint)
        after = first.hidden().clone()
        inputs = routed.inputs.clone() if routed else None

        second = Walk(checkpoint, batches, tmp_path)
        second.start(position)
        assert second.hidden().equal(before)
        routed = step(second, checkpoint)
        assert second.hidden().equal(after)
        assert inputs is None or (routed and routed.inputs.equal(inputs))

        first = Walk(checkpoint, batches, tmp_path)
        first.start(position + 1)
        assert first.position == position + 1
        assert first.hidden().equal(after)


def test_a_walk_that_is_killed_loses_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with a file written, but not yet renamed, at each rename there is."""
    batches = random_batches(checkpoint)
    walk = Walk(checkpoint, batches, tmp_path)
    walk.start()
    publish = PartialFile.publish
    for position, block in enumerate(walk.blocks):
        outputs = experts_outputs(checkpoint, block, walk.collect())
        outputs = None if outputs is None else outputs.clone()
        before = walk.hidden().clone()
        renames = (
            2
            if walk.blocks[position + 1 : position + 2]
            and (walk.blocks[position + 1].name == "decoder.block.0")
            else 1
        )
        for allowed in range(renames):
            with monkeypatch.context() as patch:
                left = iter(range(allowed))

                def killed(self: PartialFile, left: Iterator[int] = left) -> None:
                    if next(left, None) is None:
                        raise KeyboardInterrupt
                    publish(self)

                patch.setattr(PartialFile, "publish", killed)
                patch.setattr(PartialFile, "discard", PartialFile.seal)
                patch.setattr(PartialFile, "seal", lambda self: None)
                with pytest.raises(KeyboardInterrupt):
                    walk.advance(outputs)
            assert list(tmp_path.glob(".*.partial"))
            walk = Walk(checkpoint, batches, tmp_path)
            walk.start(position)
            assert not list(tmp_path.glob(".*.partial"))
            assert walk.hidden().equal(before)
        walk.advance(outputs)


def test_files_that_no_later_block_needs_are_deleted(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "old.rows").write_text("of another walk")
    walk = Walk(checkpoint, random_batches(checkpoint), tmp_path)
    walk.start()
    for block in walk.blocks:
        encoded = 1 if block.name.startswith("decoder.") else 0
        walk.collect()
        routed = 4 if block.experts else 0
        assert len(list(tmp_path.iterdir())) == 1 + 1 + encoded + routed
        step(walk, checkpoint)
        assert len(list(tmp_path.iterdir())) <= 1 + 2 + 1
    assert (tmp_path / "other.json").exists()


def test_only_the_current_block_is_in_memory(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = checkpoint.read

    def noted(name: str) -> Tensor:
        read.append(name)
        return original(name)

    monkeypatch.setattr(checkpoint, "read", noted)
    walk = Walk(checkpoint, random_batches(checkpoint), tmp_path)

    def in_memory() -> set[str]:
        return {
            f"{part._name}.{name}"
            for part in walk._parts
            for name, parameter in part._module.named_parameters()
            # An embedding may be one number, repeated.
            if not parameter.is_meta and parameter.untyped_storage().nbytes() > 4
        }

    always = in_memory()
    assert always == set(read)
    assert all(name.endswith(("norm.weight", "attention_bias.weight")) for name in always)
    walk.start()
    for block in walk.blocks:
        assert in_memory() == always
        read.clear()
        routed = walk.collect()
        assert all(name.startswith(f"{block.name}.") and ".experts." not in name for name in read)
        outputs = experts_outputs(checkpoint, block, routed)
        read.clear()
        walk.advance(outputs)
        assert read or routed  # such a block runs once
        embeddings = ("shared.weight", "decoder.embed_tokens.weight")
        assert all(name.startswith(f"{block.name}.") or name in embeddings for name in read)
        assert not any(".experts." in name for name in read)
    assert in_memory() == always


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_tokens_of_an_expert(data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, min(number, 3)))
    token = st.permutations(range(number)).map(lambda order: order[:k])
    dropped = st.lists(st.booleans(), min_size=k, max_size=k)
    drawn = data.draw(st.lists(st.tuples(token, dropped), min_size=1, max_size=20))
    experts = torch.tensor(
        [[-1 if gone else e for e, gone in zip(*pair, strict=True)] for pair in drawn]
    )
    weights = torch.arange(experts.numel(), dtype=torch.float32).view(experts.shape)
    counted = torch.ones(len(drawn), dtype=torch.bool)
    with tempfile.TemporaryDirectory() as name:

        def written(part: str, tensor: Tensor) -> RowFile:
            rows = RowFile(Path(name) / f"{part}.rows", len(drawn), k, tensor.dtype)
            with rows.writing() as append:
                append(tensor[:1])
                append(tensor[1:])
            return rows

        inputs, factors = written("inputs", weights), written("weights", weights)
        routed = RoutedTokens(inputs, written("experts", experts), factors, counted, number)
        for expert in range(number):
            wanted = [
                (position, weights[position, slot].item())
                for position, row in enumerate(experts.tolist())
                for slot, chosen in enumerate(row)
                if chosen == expert
            ]
            positions, found = routed.tokens_of(expert)
            assert list(zip(positions.tolist(), found.tolist(), strict=True)) == wanted
        outputs = routed.outputs()
        outputs[0] = 1
        assert routed.outputs().count_nonzero() == 0
        assert routed.experts.equal(experts)


def test_a_block_with_nan_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "walk").mkdir()
    name = "encoder.block.1.layer.0.layer_norm.weight"
    folder = changed(models["switch"], tmp_path / "nan", lambda s: s[name].fill_(float("nan")))
    with open_checkpoint(folder) as checkpoint:
        walk = Walk(checkpoint, random_batches(checkpoint), tmp_path / "walk")
        walk.start()
        step(walk, checkpoint)
        before = walk.hidden().clone()
        assert "encoder.block.1:" in refusal(walk.collect, "value")
        assert walk.hidden().equal(before)
        assert not list((tmp_path / "walk").glob("*inputs.rows*"))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite(switch: Checkpoint, tmp_path: Path, wrong: float) -> None:
    walk = Walk(switch, random_batches(switch), tmp_path)
    walk.start()
    step(walk, switch)
    routed = walk.collect()
    assert routed
    outputs = routed.outputs()
    assert "(0, 0)" in refusal(lambda: walk.advance(outputs[:0, :0]), "argument")
    assert "encoder.block.1" in refusal(lambda: walk.advance(None), "argument")
    outputs[3, 4] = wrong
    assert "encoder.block.1:" in refusal(lambda: walk.advance(outputs), "value")
    outputs[3, 4] = 0
    walk.advance(outputs)
    assert walk.position == 2


def test_a_tensor_that_is_missing_or_of_another_shape(
    models: dict[str, Path], tmp_path: Path
) -> None:
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    table = "model.embed_tokens.weight"
    for number, (name, change) in enumerate(
        [
            ("model.layers.1.mlp.gate.weight", lambda state: state.pop(gate)),
            (table, lambda state: state.pop(table)),
            (table, lambda state: state.update({table: state[table][1:].clone()})),
        ]
    ):
        folder = changed(models["mixtral"], tmp_path / str(number), change)
        with open_checkpoint(folder) as checkpoint:
            message = refusal(partial(walk_to_the_end, checkpoint, tmp_path), "checkpoint")
        assert repr(name) in message


@pytest.mark.parametrize(
    ("model", "changes", "where"),
    [
        ("mixtral", {"num_experts_per_tok": 99}, "model.layers.0"),
        ("mixtral", {"num_key_value_heads": 4}, "'model.layers.0.self_attn.k_proj.weight'"),
        ("switch", {"decoder_sparse_step": 3}, "'decoder.block.0.layer.2.mlp.wi.weight'"),
    ],
)
def test_a_config_of_another_model(
    models: dict[str, Path], tmp_path: Path, model: str, changes: dict[str, Any], where: str
) -> None:
    folder = changed(models[model], tmp_path / "model", lambda state: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with open_checkpoint(folder) as checkpoint:
        said = refusal(lambda: walk_to_the_end(checkpoint, tmp_path), "checkpoint")
    assert where in said


def test_batches_that_do_not_fit(switch: Checkpoint, tmp_path: Path) -> None:
    batches = random_batches(switch)
    one = batches[0]
    nothing = Tokens(one.inputs.ids, one.inputs.attended & False, one.inputs.counted & False)
    other = Tokens(one.inputs.ids + VOCABULARY, one.inputs.attended, one.inputs.counted)
    for wrong in (
        [],
        [Batch(one.inputs, None)],
        [*batches, Batch(one.inputs, None)],
        [Batch(nothing, one.targets)],
        [Batch(other, one.targets)],
    ):
        refusal(partial(Walk, switch, wrong, tmp_path), "argument")


def test_a_start_without_its_files(switch: Checkpoint, tmp_path: Path) -> None:
    batches = random_batches(switch)
    walk = Walk(switch, batches, tmp_path)
    assert "hidden-0-00002.rows" in refusal(lambda: walk.start(2), "not-found")
    refusal(lambda: walk.start(len(walk.blocks) + 1), "argument")
    walk.start()
    for _ in range(5):
        step(walk, switch)
    fewer = Walk(switch, batches[:2], tmp_path)
    refusal(lambda: fewer.start(5), "not-found")
    (tmp_path / "encoded.rows").unlink()
    assert "encoded.rows" in refusal(lambda: walk.start(5), "not-found")


def test_a_full_disk(switch: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = Walk(switch, random_batches(switch), tmp_path)
    walk.start()
    before = walk.hidden().clone()

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert "free some space" in refusal(lambda: walk.advance(None), "io")
    assert len(list(tmp_path.iterdir())) == 1
    assert walk.position == 0
    assert walk.hidden().equal(before)
    walk.advance(None)


@pytest.mark.parametrize(
    ("model_type", "runs"),
    [
        ("mixtral", 1),
        ("deepseek_v3", 1),  # adds the shared experts first
        ("granitemoe", 2),  # multiplies by residual_multiplier
        ("gemma4", 2),  # normalizes what the experts return
    ],
)
def test_a_block_that_only_adds_runs_once(tmp_path: Path, model_type: str, runs: int) -> None:
    with open_checkpoint(save_model(tmp_path / "model", model_type)) as checkpoint:
        batches = random_batches(checkpoint)
        walk = Walk(checkpoint, batches, tmp_path)
        walk.start()
        while walk.blocks[walk.position].experts is None:
            walk.advance(None)
        run = ModelPart.run_block
        with mock.patch.object(ModelPart, "run_block", autospec=True, side_effect=run) as counted:
            step(walk, checkpoint)
        assert counted.call_count == runs * len(batches) + 2  # two to find out
