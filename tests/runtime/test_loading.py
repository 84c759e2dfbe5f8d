"""A model from one file: what is loaded, what is not, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
    SwitchTransformersForConditionalGeneration,
)

import qmoe_format
from qmoe_format import load_model, load_tokenizer
from qmoe_format.container.reader import QMoEFile
from qmoe_format.runtime.loading import load_original
from tests.refusals import refusal
from tests.runtime.conftest import Converted
from tests.runtime.models import PADDED, from_pretrained, generated, logits
from tests.tiny_models import save_model

Change = Callable[[dict[str, Any], dict[str, Any]], object]


def rewritten(source: Path, path: Path, change: Change) -> Path:
    """A copy of a file; ``change`` is given its attachments and its tensors, both by name."""
    with qmoe_format.open(source) as file, qmoe_format.Writer(path) as writer:
        attachments = {name: file.attachment(name) for name in file.attachments}
        tensors: dict[str, Any] = dict(file.tensors)
        change(attachments, tensors)
        for name, data in attachments.items():
            writer.add_attachment(name, data)
        for name, entry in tensors.items():
            if not entry.stack:
                writer.add_tensor(name, file.read(entry.name), entry.dtype)
                continue
            with writer.add_stack(
                name, entry.shape, entry.dtype, entry.encoding, entry.members
            ) as stack:
                for expert in range(entry.shape[0]):
                    stack.append(file.encoded(entry.name, expert))
    return path


def configured(**changes: Any) -> Change:
    """Other values in ``config.json``; None: without the key."""

    def change(attachments: dict[str, Any], tensors: dict[str, Any]) -> None:
        config = json.loads(attachments["config.json"]) | changes
        config = {key: value for key, value in config.items() if value is not None}
        attachments["config.json"] = json.dumps(config).encode()

    return change


def test_everything_but_experts_is_loaded_and_nothing_else_is_kept(model: Converted) -> None:
    loaded = load_model(model.file)
    assert not loaded.training
    assert loaded.config.quantization_config.to_dict() == {
        "quant_method": "qmoe",
        "file": "experts.qmoe",
    }
    with qmoe_format.open(model.file) as file:
        dense = {name for name, entry in file.tensors.items() if not entry.stack}
        size = sum(file.tensors[name].item.size for name in dense)
    tensors = {id(t): t for t in (*loaded.parameters(), *loaded.buffers())}.values()
    rotary = sum(buffer.nbytes for name, buffer in loaded.named_buffers() if "inv_freq" in name)
    assert sum(tensor.nbytes for tensor in tensors) == size + rotary
    expected = from_pretrained(model.dense).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_original_is_what_transformers_loads(tmp_path: Path) -> None:
    """It keeps some weights, such as a router's bias, in float32."""
    folder = save_model(tmp_path / "model", "deepseek_v3", torch.float32)
    found = load_original(folder, torch.bfloat16).state_dict()
    expected = from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in expected.values()} == {torch.bfloat16, torch.float32}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert tensor.equal(found[name]), name


def test_nothing_of_an_expert_is_read_before_a_token_goes_there(
    model: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    encoded = QMoEFile.encoded

    def counted(self: QMoEFile, name: str, expert: int | None = None) -> Any:
        read.append((name, expert))
        return encoded(self, name, expert)

    monkeypatch.setattr(QMoEFile, "encoded", counted)
    loaded = load_model(model.file)
    assert not read
    loaded(**{name: tensor[:1, :1] for name, tensor in PADDED.items()}, **first_token(loaded))
    layers = 2 if loaded.config.is_encoder_decoder else loaded.config.num_hidden_layers
    stacks, top_k = (2, 1) if loaded.config.is_encoder_decoder else (3, 2)
    assert len(read) == layers * stacks * top_k


def first_token(model: Any) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": torch.tensor([[0]])} if model.config.is_encoder_decoder else {}


def test_building_does_not_take_longer_with_more_experts(tmp_path: Path) -> None:
    modules = []
    for experts in (2, 24):
        folder = save_model(tmp_path / str(experts), "switch_transformers", num_experts=experts)
        file = qmoe_format.convert(folder, tmp_path / f"{experts}.qmoe", threads=1)
        made: list[nn.Module] = []
        hook = nn.modules.module.register_module_module_registration_hook(
            lambda parent, name, child, made=made: made.append(child)
        )
        try:
            load_model(file)
        finally:
            hook.remove()
        modules.append(len(made))
    assert modules[0] == modules[1]


def test_other_switch_transformers_keep_their_experts(converted: Any) -> None:
    files = converted("switch_transformers")
    load_model(files.file)
    config = AutoConfig.from_pretrained(files.dense)
    other = SwitchTransformersForConditionalGeneration(config)
    assert len(other.encoder.block[1].layer[1].mlp.experts) == config.num_experts
    assert logits(other).isfinite().all()


@torch.no_grad()
def test_bfloat16(model: Converted) -> None:
    loaded = load_model(model.file, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    found = logits(loaded)
    assert found.dtype == torch.bfloat16
    exact = logits(from_pretrained(model.dense))
    usual = logits(from_pretrained(model.dense, dtype=torch.bfloat16))
    assert (found - exact).norm() < 1.1 * (usual - exact).norm()


@torch.no_grad()
def test_weights_can_be_changed(model: Converted) -> None:
    """Those that are stored raw would otherwise be views of a mapped file, which must not be."""
    before = model.file.read_bytes()
    for parameter in load_model(model.file).parameters():
        parameter.fill_(1)
    assert model.file.read_bytes() == before


def test_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "checkpoint", "mixtral", torch.bfloat16)
    file = qmoe_format.convert(folder, tmp_path / "m.qmoe", threads=1)
    assert load_model(file).dtype == torch.bfloat16
    without = rewritten(file, tmp_path / "without.qmoe", configured(dtype=None))
    assert load_model(without).dtype == torch.bfloat16


@torch.no_grad()
def test_cache_and_padding(model: Converted) -> None:
    loaded = load_model(model.file)
    tokens = generated(loaded)
    assert generated(loaded, use_cache=False) == tokens
    alone = loaded.generate(
        PADDED["input_ids"][1:, 3:], do_sample=False, max_new_tokens=12, min_new_tokens=12
    ).tolist()
    start = 0 if loaded.config.is_encoder_decoder else 3
    assert alone[0] == tokens[1][start:]


def test_adapters_learn_around_frozen_experts(model: Converted) -> None:
    loaded = load_model(model.file)
    loaded.requires_grad_(False)
    torch.manual_seed(0)
    added = []
    for module in list(loaded.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name in ("q", "q_proj"):
                adapter = Adapter(child)
                setattr(module, name, adapter)
                added += [adapter.down.weight, adapter.up.weight]
    optimizer = torch.optim.Adam(added, 0.01)
    loaded.train()
    labels = PADDED["input_ids"][:1]
    losses = []
    for _ in range(8):
        loss = loaded(input_ids=PADDED["input_ids"][:1], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in added)
    assert losses[-1] < 0.97 * losses[0]


class Adapter(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 4, bias=False)
        self.up = nn.Linear(4, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x) + self.up(self.down(x))
        return y


def test_shards(tmp_path: Path, model: Converted) -> None:
    folder = tmp_path / "checkpoint"
    with qmoe_format.open(model.file) as file:
        kind = json.loads(file.attachment("config.json"))["model_type"]
    save_model(folder, kind, torch.float32)
    path = qmoe_format.convert(folder, tmp_path / "m.qmoe.json", threads=1, shard_bytes=30_000)
    assert len(list(tmp_path.glob("*.qmoe"))) > 2
    assert torch.equal(logits(load_model(path)), logits(load_model(model.file)))


def test_tokenizer(model: Converted) -> None:
    tokenizer = load_tokenizer(model.file)
    ids = tokenizer("w3 w5 nonsense").input_ids
    assert ids == [6, 8, 2]
    assert tokenizer.decode(ids[:2]) == "w3 w5"


def test_generation_config_in_its_own_file_or_in_the_configuration(
    model: Converted, tmp_path: Path
) -> None:
    own = json.dumps({"eos_token_id": 7}).encode()
    path = rewritten(
        model.file,
        tmp_path / "own.qmoe",
        lambda attachments, tensors: attachments.update({"generation_config.json": own}),
    )
    assert load_model(path).generation_config.eos_token_id == 7

    def old(attachments: dict[str, Any], tensors: dict[str, Any]) -> None:
        attachments.pop("generation_config.json")
        configured(num_beams=3, eos_token_id=9)(attachments, tensors)

    path = rewritten(model.file, tmp_path / "old.qmoe", old)
    loaded = load_model(path)
    assert (loaded.generation_config.num_beams, loaded.generation_config.eos_token_id) == (3, 9)


def test_a_file_without_a_configuration(model: Converted, tmp_path: Path) -> None:
    path = rewritten(
        model.file, tmp_path / "m.qmoe", lambda attachments, _: attachments.pop("config.json")
    )
    assert "config.json" in refusal(lambda: load_model(path), "not-found")
    path = rewritten(
        model.file,
        tmp_path / "m.qmoe",
        lambda attachments, _: attachments.update({"config.json": b"[]"}),
    )
    assert "config.json" in refusal(lambda: load_model(path), "checkpoint")


def test_a_file_without_a_tokenizer(model: Converted, tmp_path: Path) -> None:
    def without(attachments: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in [name for name in attachments if "token" in name]:
            del attachments[name]

    path = rewritten(model.file, tmp_path / "m.qmoe", without)
    assert "no tokenizer" in refusal(lambda: load_tokenizer(path), "not-found")


def test_code_from_the_file_is_not_run(model: Converted, tmp_path: Path) -> None:
    def change(attachments: dict[str, Any], tensors: dict[str, Any]) -> None:
        kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
        configured(auto_map=dict.fromkeys(kinds, "theirs.Theirs"))(attachments, tensors)
        own = json.loads(attachments["tokenizer_config.json"])
        own |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs"] * 2}}
        attachments["tokenizer_config.json"] = json.dumps(own).encode()
        attachments["theirs.py"] = f"open({str(tmp_path / 'run')!r}, 'w')".encode()

    path = rewritten(model.file, tmp_path / "m.qmoe", change)
    assert torch.equal(logits(load_model(path)), logits(load_model(model.file)))
    assert load_tokenizer(path)("w3 w5").input_ids == [6, 8]
    assert not (tmp_path / "run").exists()


def test_an_original_that_cannot_be_loaded(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "mixtral")
    (folder / "generation_config.json").write_text("[]")
    message = refusal(lambda: load_original(folder, torch.float32), "checkpoint")
    assert "transformers cannot load it" in message


def test_a_family_that_cannot_be_run(model: Converted, tmp_path: Path) -> None:
    path = rewritten(model.file, tmp_path / "m.qmoe", configured(model_type="jetmoe"))
    message = refusal(lambda: load_model(path), "checkpoint")
    assert "'jetmoe'" in message
    assert "its attention has experts" in message


@pytest.mark.parametrize("kind", ["stack", "norm"])
def test_a_missing_tensor(model: Converted, tmp_path: Path, kind: str) -> None:
    with qmoe_format.open(model.file) as file:
        names = [n for n, entry in file.tensors.items() if entry.stack == (kind == "stack")]
    gone = [name for name in names if kind == "stack" or kind in name][-1]
    path = rewritten(model.file, tmp_path / "m.qmoe", lambda _, tensors: tensors.pop(gone))
    message = refusal(lambda: load_model(path), "checkpoint")
    assert (gone.rpartition(".")[0] in message) if kind == "stack" else (gone in message)


def test_a_tensor_of_another_shape(model: Converted, tmp_path: Path) -> None:
    path = rewritten(model.file, tmp_path / "m.qmoe", configured(vocab_size=50))
    message = refusal(lambda: load_model(path), "checkpoint")
    assert "has shape [71, 64], but by config.json its shape is [50, 64]" in message


@pytest.mark.parametrize(
    "changes", [{"num_experts": 5, "num_local_experts": 5}, {"d_ff": 64, "intermediate_size": 64}]
)
def test_experts_of_another_shape(
    model: Converted, tmp_path: Path, changes: dict[str, int]
) -> None:
    path = rewritten(model.file, tmp_path / "m.qmoe", configured(**changes))
    assert "but by config.json experts are" in refusal(lambda: load_model(path), "checkpoint")


@pytest.mark.parametrize(("place", "taken"), [(0, 1), (1, 0)])
def test_stacks_in_each_others_place(
    model: Converted, tmp_path: Path, place: int, taken: int
) -> None:
    def change(attachments: dict[str, Any], tensors: dict[str, Any]) -> None:
        names = [name for name, entry in tensors.items() if entry.stack][:2]
        tensors[names[place]] = tensors[names[taken]]

    path = rewritten(model.file, tmp_path / "m.qmoe", change)
    message = refusal(lambda: load_model(path), "checkpoint")
    assert "incomplete" in message or "there twice" in message


@pytest.mark.parametrize("layers", [1, 3, 10**9, "two"])
def test_another_number_of_layers(model: Converted, tmp_path: Path, layers: object) -> None:
    with qmoe_format.open(model.file) as file:
        config = json.loads(file.attachment("config.json"))
    key = "num_layers" if "num_layers" in config else "num_hidden_layers"
    path = rewritten(model.file, tmp_path / "m.qmoe", configured(**{key: layers}))
    assert str(path) in refusal(lambda: load_model(path), "checkpoint")


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_does_not_exist(model: Converted, device: str) -> None:
    assert device in refusal(lambda: load_model(model.file, device=device), "argument")


def test_stacks_and_tensors_beyond_the_last_layer_are_left_out(
    converted: Callable[[str], Converted], tmp_path: Path
) -> None:
    """Such as those of multi-token prediction."""
    file = converted("mixtral").file
    with qmoe_format.open(file) as opened:
        layers = json.loads(opened.attachment("config.json"))["num_hidden_layers"]
    fewer = configured(num_hidden_layers=layers - 1, num_nextn_predict_layers=1)
    loaded = load_model(rewritten(file, tmp_path / "m.qmoe", fewer))
    assert len(loaded.model.layers) == layers - 1
    assert logits(loaded).isfinite().all()


def test_running_out_of_memory_is_not_blamed_on_the_file(
    model: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="memory"):
        load_model(model.file)


def test_experts_alone_are_no_model(model: Converted) -> None:
    message = refusal(lambda: load_model(model.folder / "experts.qmoe"), "checkpoint")
    assert "there are no " in message
