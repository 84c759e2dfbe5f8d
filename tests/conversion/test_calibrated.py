"""Conversions with calibration text, from tiny models to files that transformers can run."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import qmoe_format
from qmoe_format.container.inspection import describe
from qmoe_format.conversion.report import read_report, report_path
from qmoe_format.export.unpacking import unpack

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from qmoe_format.calibration.sequences import read_batches
from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.conversion.block_experts import BlockExperts
from qmoe_format.conversion.quantize_block import BlockRecord
from qmoe_format.conversion.rate_control import Attempt, TargetRate
from qmoe_format.quantize.rate import Rate
from tests.refusals import refusal
from tests.tiny_models import changed, load_model

Convert = Callable[..., Path]


def batches_of(folder: Path, text: Path, **options: Any) -> list[Any]:
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return read_batches(tokenizer, config, text, sequence_length=32, **options)


def outputs(folder: Path, batches: list[Any]) -> Tensor:
    """Logits at all places that are not padding."""
    model = load_model(folder)
    return torch.cat(
        [run(model, batch)[(batch.targets or batch.inputs).attended] for batch in batches]
    )


@torch.no_grad()
def run(model: Any, batch: Any) -> Tensor:
    """Logits."""
    arguments = {"input_ids": batch.inputs.ids, "attention_mask": batch.inputs.attended.long()}
    if batch.targets:
        arguments["decoder_input_ids"] = batch.targets.ids
    found: Tensor = model(**arguments).logits
    return found


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


def assert_better_than_rounding(
    model: Path, file: Path, batches: list[Any], converted: Convert
) -> None:
    rounded = converted(model, "rounded.qmoe", recipe="rtn", calibration=None)
    wanted, found = outputs(model, batches), []
    for each in (file, rounded):
        found.append(outputs(unpack(each, each.with_suffix("")), batches))
    assert far(found[0], wanted) < far(found[1], wanted)


def report_of(file: Path) -> Any:
    with qmoe_format.open(file) as opened:
        return read_report(opened)


@pytest.mark.parametrize("recipe", ["qmoe", "rd"])
def test_a_file_that_transformers_runs(
    model: Path, text: Path, converted: Convert, tmp_path: Path, recipe: str
) -> None:
    options: dict[str, Any] = {"rate_lambda": 0.002} if recipe == "rd" else {}
    file = converted(model, recipe=recipe, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.qmoe", "m.quality.json"]
    with qmoe_format.open(file) as opened:
        opened.verify()
        total = describe(opened)["totals"]["experts"]["total_bits_per_weight"]
        assert (tmp_path / "m.quality.json").read_bytes() == opened.attachment("quality.json")
    report = report_of(file)
    assert report["totals"]["total_bits_per_weight"] == pytest.approx(total, rel=1e-5)
    with open_checkpoint(model) as checkpoint:
        expected = {stack.name: stack.experts for stack in checkpoint.stacks}
    assert {each["name"]: len(each["experts"]) for each in report["stacks"]} == expected
    assert_better_than_rounding(model, file, batches_of(model, text), converted)


def test_an_encoder_decoder_with_its_own_targets(
    switch_folder: Path, text: Path, converted: Convert, tmp_path: Path
) -> None:
    lines = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    pairs = [{"text": line[: len(line) // 2], "answer": line} for line in lines]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    file = converted(switch_folder, text=path, target_column="answer", rate_lambda=0.002)
    report = report_of(file)
    assert report["settings"]["target_column"] == "answer"
    assert report["totals"]["sequences"] == len(pairs)
    assert all(each["tokens"] for stack in report["stacks"] for each in stack["experts"])
    batches = batches_of(switch_folder, path, target_column="answer")
    assert_better_than_rounding(switch_folder, file, batches, converted)


def test_a_block_that_is_done_again(
    model: Path, converted: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same rate nothing changes: each attempt begins from the same state."""
    once = converted(model, "once.qmoe", bits_per_weight=1.6).read_bytes()
    quantize = TargetRate.quantize

    def twice(self: TargetRate, attempt: Attempt) -> BlockRecord:
        def again(rate: Rate | None) -> BlockRecord:
            attempt(rate)
            return attempt(rate)

        return quantize(self, again)

    monkeypatch.setattr(TargetRate, "quantize", twice)
    seen: list[tuple[int, int]] = []
    file = converted(
        model, bits_per_weight=1.6, progress=lambda done, total, *_: seen.append((done, total))
    )
    assert file.read_bytes() == once
    assert all(done <= total for done, total in seen)
    back = [after for (before, _), (after, _) in pairwise(seen) if after < before]
    assert len(back) >= 3, "after the survey, and for each attempt"


def test_the_report_tells_the_truth(
    model: Path, text: Path, converted: Convert, tmp_path: Path
) -> None:
    """Of the first experts, whose inputs are those of the original model."""
    file = converted(model, recipe="qmoe", mask_special_tokens=True)
    unpack(file, tmp_path / "unpacked")
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "unpacked" / "model-00001-of-00001.safetensors")
    head, matrix, member, router, k = first_experts(model)
    batches = batches_of(model, text)
    read = torch.cat([batch.inputs.ids[batch.inputs.attended] for batch in batches])
    special = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(
        ["</s>", *(f"<extra_id_{number}>" for number in range(8))]
    )
    counted = ~torch.isin(read, torch.tensor(special))
    inputs = experts_inputs(model, head, batches)[counted].double()
    chosen = (inputs @ before[router].double().T).topk(k).indices
    report = {each["name"]: each for each in report_of(file)["stacks"]}[f"{head}.{matrix}"]
    assert report["lambda"] is None
    assert sum(each["tokens"] for each in report["experts"]) == chosen.numel()
    for number, each in enumerate(report["experts"]):
        token = (chosen == number).any(1)
        w = before[f"{head}.{member.format(number)}"].double()
        q = after[f"{head}.{member.format(number)}"].double()
        error = far(inputs[token] @ q.T, inputs[token] @ w.T)
        assert each["tokens"] == int(token.sum())
        assert each["relative_error"] == pytest.approx(error, rel=0.02)
    with qmoe_format.open(file) as opened:
        stored = opened.tensors[f"{head}.{matrix}"].stored_bytes
    bits = sum(each["bits"] for each in report["experts"])
    assert stored == pytest.approx(bits * w.numel() / 8)


def test_all_experts_see_all_tokens(model: Path, converted: Convert) -> None:
    file = converted(model, recipe="qmoe", samples=3, all_experts=True, token_cap=100.0)
    report = report_of(file)
    assert report["settings"]["all_experts"] is True
    seen = {
        (stack["name"].partition(".")[0], expert["tokens"])
        for stack in report["stacks"]
        for expert in stack["experts"]
    }
    assert sum(tokens for _, tokens in seen) == report["totals"]["counted_tokens"]
    usual = report_of(converted(model, "usual.qmoe", recipe="qmoe", samples=3))
    assert usual["settings"]["all_experts"] is False


def first_experts(model: Path) -> tuple[str, str, str, str, int]:
    """Of the first sparse block: experts, a matrix, its member, router, experts for a token."""
    if (model / "config.json").read_text().count("switch"):
        layer = "encoder.block.1.layer.1.mlp"
        router = f"{layer}.router.classifier.weight"
        return f"{layer}.experts", "wi", "expert_{}.wi.weight", router, 1
    layer = "model.layers.0.block_sparse_moe"
    return f"{layer}.experts", "w3", "{}.w3.weight", f"{layer}.gate.weight", 2


def experts_inputs(folder: Path, head: str, batches: list[Any]) -> Tensor:
    """What the experts of a block are given in transformers' own forward, without padding."""
    model = load_model(folder)
    seen: list[Tensor] = []
    module = model.get_submodule(head.replace("block_sparse_moe", "mlp"))
    module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for batch in batches:
        run(model, batch)
    kept = [
        (batch.targets if head.startswith("decoder") else batch.inputs).attended.flatten()
        for batch in batches
    ]
    return torch.cat([x.flatten(0, -2)[own] for x, own in zip(seen, kept, strict=True)])


def test_rows_are_weighed_by_what_they_matter(
    switch_folder: Path, text: Path, converted: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe rd weighs tokens by router weight over the length of the hidden states."""
    measure = BlockExperts.measure
    given: list[Tensor] = []

    def noted(self: BlockExperts, *arguments: Any) -> Any:
        energies, importance = measure(self, *arguments)
        given.extend(self.by_stack(importance).values())
        return energies, importance

    monkeypatch.setattr(BlockExperts, "measure", noted)
    converted(switch_folder, recipe="rd", rate_lambda=0.1)
    block = "encoder.block.1"
    head = f"{block}.layer.1.mlp.experts"
    model, batches = load_model(switch_folder), batches_of(switch_folder, text)
    seen: dict[str, list[Tensor]] = {"x": [], "h": [], "y": [], "p": []}

    def experts(module: Any, arguments: Any, result: Tensor) -> None:
        seen["x"].append(arguments[0].flatten(0, -2))
        seen["p"].append(arguments[2].flatten())
        seen["y"].append(result.flatten(0, -2))

    model.get_submodule(head).register_forward_hook(experts)
    model.get_submodule(block).register_forward_pre_hook(
        lambda _, arguments: seen["h"].append(arguments[0].flatten(0, -2))
    )
    for batch in batches:
        run(model, batch)
    real = torch.cat([batch.inputs.attended.flatten() for batch in batches])
    x, h, y, p = (torch.cat(seen[name])[real] for name in "xhyp")
    gates = p / (h.square().sum(1) + y.square().sum(1)).sqrt()
    state = load_file(switch_folder / "model.safetensors")
    router = state[f"{block}.layer.1.mlp.router.classifier.weight"].float()
    chosen = (x @ router.T).argmax(1)
    for expert in range(4):
        wi, wo = (state[f"{head}.expert_{expert}.{name}.weight"].float() for name in ("wi", "wo"))
        own, before = chosen == expert, x[chosen == expert] @ wi.T
        square = gates[own, None].square()
        slopes = (before > 0) * wo.square().sum(0)
        inputs, output = given[:2]  # of the encoder's first block with experts
        torch.testing.assert_close(inputs[expert], (slopes * square).mean(0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(output[expert], square.mean(0), rtol=1e-3, atol=1e-6)


def test_later_blocks_see_what_earlier_ones_have_become(
    switch_folder: Path,
    text: Path,
    converted: Convert,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from qmoe_format.calibration.walk import Walk

    collect = Walk.collect
    seen: list[Tensor] = []

    def noted(walk: Walk) -> Any:
        if routed := collect(walk):
            seen.append(routed.inputs.clone())
        return routed

    monkeypatch.setattr(Walk, "collect", noted)
    file = converted(switch_folder, recipe="rd", rate_lambda=0.1)
    unpack(file, tmp_path / "unpacked")
    head = "decoder.block.1.layer.2.mlp.experts"
    batches = batches_of(switch_folder, text)
    original = experts_inputs(switch_folder, head, batches)
    compressed = experts_inputs(tmp_path / "unpacked", head, batches)
    (_, planned), (_, given) = seen[:2], seen[2:]
    assert far(planned[: len(original)], original) < 1e-9  # after these come copies with noise
    assert far(given, compressed) < 1e-4 < 100 * far(given, compressed) < far(given, original)


def test_the_same_bytes_again_and_whatever_the_threads(model: Path, converted: Convert) -> None:
    options = {"rate_lambda": 0.1, "samples": 10}
    first = converted(model, "a.qmoe", **options)
    for name, threads in (("b.qmoe", 1), ("c.qmoe", 3)):
        again = converted(model, name, threads=threads, **options)
        assert again.read_bytes() == first.read_bytes()
        assert report_path(again).read_bytes() == report_path(first).read_bytes()


@pytest.mark.parametrize(
    ("model", "share"), [("switch", 0.3), ("mixtral", 0.8)], indirect=["model"]
)
def test_as_many_bits_as_asked_for(model: Path, converted: Convert, share: float) -> None:
    """What was measured before a refusal is kept for another size, and for nothing else."""
    said = refusal(lambda: converted(model, bits_per_weight=100.0), "argument")
    assert "100 bits per weight are out of reach" in said
    for other in ({"rate_lambda": 0.1}, {"bits_per_weight": 1.6, "samples": 5}):
        refused = refusal(lambda: converted(model, resume=True, **other), "argument")  # noqa: B023
        assert "belongs to another conversion" in refused
    assert said.endswith(", then continue with --resume")
    least, most = map(float, said.partition("ask for ")[2].split(" with")[0].split(" to "))
    asked = least + share * (most - least)
    file = converted(model, bits_per_weight=asked, resume=True)
    with qmoe_format.open(file) as opened:
        got = describe(opened)["totals"]["experts"]["total_bits_per_weight"]
    assert got == pytest.approx(asked, rel=0.02)


@pytest.fixture
def zeros(model: Path, tmp_path: Path) -> Path:
    """The model with zeros in its first block: expert 0, expert 1 but for its output matrix, and
    the first rows of a matrix of expert 2."""
    head, _, member, *_ = first_experts(model)

    def clear(state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            expert, _, rest = name.removeprefix(f"{head}.").partition(".")
            if expert.endswith("0") or (expert.endswith("1") and rest[:2] not in ("wo", "w2")):
                tensor.zero_()
        state[f"{head}.{member.format(2)}"][:5] = 0

    return changed(model, tmp_path / "zeros", clear)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("switch", {"recipe": "qmoe"}),
        ("switch", {"bits_per_weight": 2.0}),
        ("mixtral", {"rate_lambda": 1e-4, "all_experts": True}),
    ],
    indirect=["model"],
)
def test_zeros(
    model: Path, zeros: Path, converted: Convert, tmp_path: Path, options: dict[str, Any]
) -> None:
    """They stay zeros, without error; an output matrix that sees none but zeros has no error."""
    head, matrix, member, *_ = first_experts(model)
    file = converted(zeros, samples=4, **options)
    unpack(file, tmp_path / "unpacked")
    before = load_file(zeros / "model.safetensors")
    after = load_file(tmp_path / "unpacked" / "model-00001-of-00001.safetensors")
    for stack in report_of(file)["stacks"]:
        if not stack["name"].startswith(head):
            continue
        errors = [expert["relative_error"] for expert in stack["experts"]]
        assert errors[0] == 0
        assert errors[1] == (None if stack["name"].endswith(("wo", "w2")) else 0)
        assert all(0 < each < 1 for each in errors[2:])
    zero = [name for name in before if name.startswith(head) and not before[name].any()]
    assert len(zero) == (3 if matrix == "wi" else 5)
    assert not any(after[name].any() for name in zero)
    assert not after[f"{head}.{member.format(2)}"][:5].any()


@pytest.mark.parametrize("wrong", [torch.nan, -torch.inf])
@pytest.mark.parametrize("options", [{"rate_lambda": 0.1}, {"calibration": None}])
def test_nan_in_what_is_kept_as_it_is(
    switch_folder: Path, converted: Convert, tmp_path: Path, options: dict[str, Any], wrong: float
) -> None:
    """The walk ends with the last experts, so no hidden state shows it."""

    def spoil(state: dict[str, Tensor]) -> None:
        state["decoder.final_layer_norm.weight"][2] = wrong

    folder = changed(switch_folder, tmp_path / "bad", spoil)
    said = refusal(lambda: converted(folder, **options), "value")
    assert "tensor 'decoder.final_layer_norm.weight'" in said
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "F16"), (torch.float32, "F32")])
def test_other_element_types(
    switch_folder: Path, converted: Convert, tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    def cast(state: dict[str, Tensor]) -> None:
        state |= {key: tensor.to(dtype) for key, tensor in state.items()}

    folder = changed(switch_folder, tmp_path / "other", cast)
    file = converted(folder, rate_lambda=0.002)
    with qmoe_format.open(file) as opened:
        opened.verify()
        for entry in opened.tensors.values():
            assert entry.dtype == name
    for stack in report_of(file)["stacks"]:
        assert all(0 < each["relative_error"] < 0.5 for each in stack["experts"])


def test_experts_without_tokens_are_named(
    switch_folder: Path, converted: Convert, tmp_path: Path, qmoe: Any
) -> None:
    """The router of the encoder prefers experts 0 and 1."""
    name = "encoder.block.1.layer.1.mlp.router.classifier.weight"

    def change(state: dict[str, Tensor]) -> None:
        state[name][2:] = state[name][0] * 0.5  # never above both of the others

    source = changed(switch_folder, tmp_path / "model", change)
    for recipe in ("qmoe", "rd"):
        file = converted(source, f"{recipe}.qmoe", recipe=recipe)
        stack = next(s for s in report_of(file)["stacks"] if s["name"].startswith("encoder"))
        empty = [each for each in stack["experts"] if each["tokens"] == 0]
        assert empty
        assert all(each["fallback"] and each["relative_error"] is None for each in empty)
        with qmoe_format.open(file) as opened:
            opened.verify()
        shown = qmoe("inspect", file, "--quality").out
        assert shown.count(empty[0]["fallback"]) >= len(empty)
        assert json.loads(qmoe("inspect", file, "--quality", "--json").out) == report_of(file)


def test_samples_and_seed(switch_folder: Path, converted: Convert) -> None:
    def report(**options: Any) -> Any:
        return report_of(converted(switch_folder, recipe="qmoe", overwrite=True, **options))

    some = report(samples=3)
    assert some["totals"]["sequences"] == 3 < report()["totals"]["sequences"]
    assert report(samples=3)["stacks"] == some["stacks"] != report(samples=3, seed=1)["stacks"]


def test_token_cap(switch_folder: Path, converted: Convert) -> None:
    def tokens(**options: Any) -> list[int]:
        file = converted(switch_folder, recipe="qmoe", overwrite=True, **options)
        stacks = {stack["name"]: stack["experts"] for stack in report_of(file)["stacks"]}
        return [each["tokens"] for each in stacks["encoder.block.1.layer.1.mlp.experts.wi"]]

    free = tokens(token_cap=1000.0)
    most = -(-sum(free) // len(free))
    assert max(free) > most > 0
    assert tokens(token_cap=1.0) == [min(number, most) for number in free]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(
    switch_folder: Path, converted: Convert, tmp_path: Path, wrong: float
) -> None:
    name = "decoder.block.1.layer.2.mlp.experts.expert_2.wo.weight"
    source = changed(
        switch_folder, tmp_path / "model", lambda s: s[name].view(-1)[5:6].fill_(wrong)
    )
    target = tmp_path / "m.qmoe"
    target.write_bytes(b"precious")
    said = refusal(lambda: converted(source, recipe="qmoe", overwrite=True), "value")
    assert name in said
    assert target.read_bytes() == b"precious"
    assert not report_path(target).exists()
    assert "--resume" not in said, "it would end in the same way"
    assert sorted(tmp_path.iterdir()) == [target, source]


@pytest.mark.parametrize(("recipe", "what"), [("qmoe", "its error on"), ("rd", "its outputs on")])
def test_hidden_states_that_overflow(
    switch_folder: Path, converted: Convert, tmp_path: Path, recipe: str, what: str
) -> None:
    """Only between the matrices of an expert."""
    head = "decoder.block.1.layer.2.mlp.experts.expert_2"

    def spoil(state: dict[str, Tensor]) -> None:
        state[f"{head}.wi.weight"] *= 1e25
        state[f"{head}.wo.weight"] *= 1e-25

    source = changed(switch_folder, tmp_path / "model", spoil)
    said = refusal(lambda: converted(source, recipe=recipe, samples=4), "value")
    assert what in said
    assert "expert_2" in said


def test_a_full_disk_and_then_some_space(
    switch_folder: Path, converted: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = converted(switch_folder, "wanted.qmoe", recipe="qmoe").read_bytes()
    calls = 0
    write = os.write

    def full(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        said = refusal(lambda: converted(switch_folder, recipe="qmoe"), "io")
    assert "free some space" in said
    assert "continue with --resume" in said
    assert not (tmp_path / "m.qmoe").exists()
    assert converted(switch_folder, recipe="qmoe", resume=True).read_bytes() == wanted


def test_a_report_of_an_earlier_conversion_is_not_kept(
    switch_folder: Path, converted: Convert, tmp_path: Path
) -> None:
    file = converted(switch_folder, recipe="qmoe")
    folder = unpack(file, tmp_path / "unpacked")
    assert (folder / "quality.json").is_file()
    again = converted(folder, "again.qmoe", recipe="qmoe", samples=3)
    assert report_of(again)["settings"]["samples"] == 3
    rounded = converted(folder, "rounded.qmoe", calibration=None)
    refusal(lambda: report_of(rounded), "not-found")


def test_shards(switch_folder: Path, converted: Convert, tmp_path: Path) -> None:
    file = converted(switch_folder, recipe="qmoe", shard_bytes=20_000)
    assert len(list(tmp_path.glob("m-*-of-*.qmoe"))) > 1
    assert len(report_of(file)["stacks"]) == 4


def test_progress(switch_folder: Path, converted: Convert) -> None:
    seen: list[tuple[Any, ...]] = []
    converted(switch_folder, rate_lambda=0.1, progress=lambda *at: seen.append(at))
    stages = [at[2].partition(",")[0] for at in seen]
    blocks = [f"{stack}.block.{number}" for stack in ("encoder", "decoder") for number in (0, 1)]
    assert list(dict.fromkeys(stages)) == [
        "read text",
        *(f"survey {each}" for each in blocks),
        *blocks,
        "write",
    ]
    for kind in ("survey decoder.block.1", "decoder.block.1", "write"):
        done, total, *_ = [at for at in seen if at[2].partition(",")[0] == kind][-1]
        assert done == total
    assert all(0 <= done <= total for done, total, *_ in seen)
    assert "decoder.block.1, expert 1 of 4" in [at[2] for at in seen]
