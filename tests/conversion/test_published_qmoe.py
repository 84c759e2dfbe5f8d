"""Converting what QMoE's authors publish: everything is kept to the bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qmoe_format

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from safetensors.torch import save_file
from torch import Tensor

from qmoe_format.checkpoints.torch_dtypes import DTYPE_NAMES, to_storage
from qmoe_format.codec import decode
from qmoe_format.container.inspection import describe
from qmoe_format.errors import QMoEWarning
from tests.checkpoints.published_folder import (
    packed,
    save_published,
    ternary,
    write_published,
)
from tests.conftest import Run, random_state, switch_config
from tests.refusals import refusal
from tests.runtime.models import from_pretrained, generated, logits
from tests.tiny_models import build_model, save_model

Pair = tuple[Path, Path]


def write_pair(base: Path, wrong: dict[str, Any], **changes: Any) -> Pair:
    """A Switch Transformer with ternary experts, as transformers and as QMoE would save it.

    Args:
        wrong: what is not true in QMoE's ``config.json``.
        changes: of the tiny model's configuration.
    """
    folder = save_model(base / "original", "switch_transformers", **changes)
    state: dict[str, Tensor] = build_model("switch_transformers", **changes).state_dict()
    for seed, name in enumerate(name for name in state if ".experts." in name):
        state[name] = ternary(state[name].shape, seed)
    tied = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    once = {name: tensor for name, tensor in state.items() if name not in tied}
    save_file(once, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | wrong
    published = write_published(base / "published", state, config)
    for path in folder.glob("*token*"):
        shutil.copy(path, published)
    return folder, published


FULL = {"num_layers": 3, "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 2}
WRONG = {
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "is_full_sparse": True,
}


@pytest.fixture(scope="module", params=["every second", "all"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Odd widths; one block of two is sparse, as in base-128, or all are, as in c-2048."""
    base = tmp_path_factory.mktemp("published")
    if request.param == "all":
        return write_pair(base, WRONG, d_ff=95, d_model=63, **FULL)
    return write_pair(base, {}, d_ff=95, d_model=63)


@pytest.fixture(scope="module")
def file(pair: Pair) -> Path:
    return qmoe_format.convert(pair[1], pair[1].parent / "published.qmoe", threads=2)


def test_levels_and_scales_are_the_same(pair: Pair, file: Path) -> None:
    parts = {
        name: tensor
        for path in pair[1].glob("exp*.pt")
        for name, tensor in torch.load(path).items()
    }
    original = from_pretrained(pair[0]).state_dict()
    with qmoe_format.open(file) as opened:
        stacks = {name: entry for name, entry in opened.tensors.items() if entry.stack}
        assert len(parts) == 4 * sum(entry.shape[0] for entry in stacks.values())
        for name, entry in stacks.items():
            assert entry.dtype == "BF16"
            for expert in range(entry.shape[0]):
                member = entry.members.replace("{}", str(expert))
                weights, encoded = original[member], opened.encoded(name, expert)
                stored = parts[f"{member.removesuffix('weight')}ter_minmax"].reshape(-1, 2)
                assert np.array_equal(encoded.row_scale, to_storage(stored))
                low, high = weights.min(1, keepdim=True)[0], weights.max(1, keepdim=True)[0]
                levels = torch.where(weights == high, 1, torch.where(weights == low, -1, 0))
                assert np.array_equal(decode(encoded.levels), levels * (weights != 0))
                assert np.array_equal(opened.read_expert(name, expert), to_storage(weights))


def test_everything_else_is_kept(pair: Pair, file: Path) -> None:
    dense = torch.load(pair[1] / "noexp.pt")
    with qmoe_format.open(file) as opened:
        assert {name for name, entry in opened.tensors.items() if not entry.stack} == dense.keys()
        for name, tensor in dense.items():
            assert opened.tensors[name].dtype == DTYPE_NAMES[tensor.dtype]
            assert np.array_equal(opened.read(name), to_storage(tensor))
        for path in pair[1].glob("*token*"):
            assert opened.attachment(path.name) == path.read_bytes()
        config = json.loads(opened.attachment("config.json"))
        before = json.loads((pair[1] / "config.json").read_text())
        if "is_full_sparse" not in before:
            assert opened.attachment("config.json") == (pair[1] / "config.json").read_bytes()
        else:
            changed = {key: config[key] for key in FULL}
            assert changed == FULL
            assert config == {k: v for k, v in before.items() if k not in WRONG} | changed


def test_the_file_is_like_one_of_the_original(pair: Pair, file: Path, tmp_path: Path) -> None:
    other = qmoe_format.convert(pair[0], tmp_path / "original.qmoe", threads=1)
    with qmoe_format.open(file) as one, qmoe_format.open(other) as two:
        for name, entry in two.tensors.items():
            own = one.tensors[name]
            for key in ("dtype", "members", "shape", "stack", "transposed"):
                assert getattr(own, key) == getattr(entry, key), name
            if entry.stack:
                assert own.encoding == entry.encoding == "int-dict"
                assert own.item.parameters == dict(entry.item.parameters) | {"symmetric": False}


def test_it_is_verified_loaded_and_runs(pair: Pair, file: Path, qmoe: Run) -> None:
    assert qmoe("verify", "--model", file).code == 0
    model = qmoe_format.load_model(file, dtype=torch.float32)
    expected = from_pretrained(pair[0], dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), logits(expected))
        assert generated(model) == generated(expected)
    done = qmoe("generate", file, "w1 w2 w3", "--max-new-tokens", "3")
    assert done.code == 0, done.err


def test_it_unpacks_to_what_transformers_loads(pair: Pair, file: Path, tmp_path: Path) -> None:
    before = from_pretrained(pair[0]).state_dict()
    after = from_pretrained(qmoe_format.unpack(file, tmp_path / "out")).state_dict()
    assert before.keys() == after.keys()
    assert all(tensor.equal(before[name]) for name, tensor in after.items())


def test_its_size_is_compared_with_what_was_published(pair: Pair, file: Path) -> None:
    with qmoe_format.open(file) as opened:
        report = describe(opened)
    sizes = [
        sum(tensor.nbytes for path in pair[1].glob(files) for tensor in torch.load(path).values())
        for files in ("exp*.pt", "noexp.pt")
    ]
    assert report["source_format"] == "qmoe"
    totals = report["totals"]
    assert [totals["experts"]["source_bytes"], totals["others"]["source_bytes"]] == sizes
    assert totals["others"]["weights"] == sum(
        tensor.numel() for tensor in torch.load(pair[1] / "noexp.pt").values()
    )


def test_the_same_bytes_from_any_number_of_threads(pair: Pair, file: Path, tmp_path: Path) -> None:
    again = qmoe_format.convert(pair[1], tmp_path / "again.qmoe", threads=1)
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "rtn"},
        {"recipe": "moqe", "bits": 4},
        {"rules": ["*=rtn"]},
        {"calibration": "text.jsonl"},
        {"calibration": "text.jsonl", "bits_per_weight": 1.0},
    ],
)
def test_it_cannot_be_quantized_in_another_way(
    pair: Pair, tmp_path: Path, options: dict[str, Any]
) -> None:
    def convert() -> object:
        return qmoe_format.convert(pair[1], tmp_path / "m.qmoe", **options)

    said = refusal(convert, "argument")
    assert f"quantized already, so {next(iter(options))} has no effect; leave it out" in said
    assert not list(tmp_path.iterdir())


def test_the_command(pair: Pair, tmp_path: Path, qmoe: Run) -> None:
    done = qmoe("convert", pair[1], tmp_path / "m.qmoe", "--profile", "size")
    assert done.code == 0, done.err
    assert "as it came" in done.out
    assert qmoe("verify", tmp_path / "m.qmoe").code == 0
    refused = qmoe("convert", pair[1], tmp_path / "n.qmoe", "--recipe", "rtn")
    assert refused.code == 1
    assert "quantized already" in refused.err


def test_damage_leaves_nothing_behind(pair: Pair, tmp_path: Path) -> None:
    """It is found when other experts are written already."""
    folder = shutil.copytree(pair[1], tmp_path / "damaged")
    last = max(folder.glob("exp*.pt"))
    parts = torch.load(last)
    name = next(name for name in parts if name.endswith("expert_3.wo.row_off"))
    parts[name][2] = 0
    torch.save(parts, last)
    said = refusal(lambda: qmoe_format.convert(folder, tmp_path / "m.qmoe"), "checkpoint")
    assert f"{last}: tensor '{name.removesuffix('row_off')}weight': row_off falls" in said
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_scale_that_is_not_finite(pair: Pair, tmp_path: Path, value: float) -> None:
    folder = shutil.copytree(pair[1], tmp_path / "damaged")
    parts = torch.load(folder / "exp00.pt")
    name = next(name for name in parts if name.endswith("ter_minmax"))
    parts[name][2] = value
    torch.save(parts, folder / "exp00.pt")
    said = refusal(lambda: qmoe_format.convert(folder, tmp_path / "m.qmoe"), "value")
    assert f"exp00.pt: tensor '{name.removesuffix('ter_minmax')}weight': a scale is" in said


def test_other_weights_come_first(pair: Pair, tmp_path: Path) -> None:
    """A folder that has the original, too, converts as the original does."""
    folder = shutil.copytree(pair[0], tmp_path / "both")
    for path in pair[1].glob("*.pt"):
        shutil.copy(path, folder)
    files = [
        qmoe_format.convert(source, tmp_path / f"{source.name}.qmoe", threads=1)
        for source in (pair[0], folder)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_a_tokenizer(pair: Pair, tmp_path: Path) -> None:
    """As the authors publish them."""
    folder = shutil.copytree(pair[1], tmp_path / "bare")
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.warns(QMoEWarning, match="there is no tokenizer"):
        qmoe_format.convert(folder, tmp_path / "m.qmoe", threads=1)
    model = qmoe_format.load_model(tmp_path / "m.qmoe")
    assert len(generated(model)) == 2


def test_only_linear_layers_are_in_bfloat16(tmp_path: Path) -> None:
    """As in base-128, whose embeddings are in float32, and once more in bfloat16 for the output."""
    state: dict[str, Tensor] = build_model("switch_transformers", torch.float32).state_dict()
    for name, tensor in state.items():
        if ".experts." in name:
            state[name] = ternary(tensor.shape)
        elif "norm" not in name and "embed" not in name and name != "shared.weight":
            state[name] = tensor.bfloat16()
    config = build_model("switch_transformers").config.to_dict()
    folder = write_published(tmp_path / "published", state, config | {"dtype": "bfloat16"})
    with pytest.warns(QMoEWarning, match="there is no tokenizer"):
        file = qmoe_format.convert(folder, tmp_path / "m.qmoe", threads=1)
    with qmoe_format.open(file) as opened:
        assert opened.tensors["shared.weight"].dtype == "F32"
        assert opened.tensors["lm_head.weight"].dtype == "BF16"
    model = qmoe_format.load_model(file)
    assert model.lm_head.weight is model.shared.weight
    for name, tensor in model.state_dict().items():
        assert tensor.equal(state[name].bfloat16()), name


def write_large(folder: Path, experts: int) -> Path:
    """One sparse block with experts of base-128's size."""
    state = random_state(switch_config(experts=1, rows=3072, columns=768))
    dense = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    router = next(name for name in dense if name.endswith("classifier.weight"))
    dense[router] = dense[router].expand(experts, -1).contiguous()
    matrices = {
        "wi": repeated(packed(ternary((48, 768))), 64),
        "wo": repeated(packed(ternary((48, 3072))), 16),
    }
    layer = {
        f"encoder.block.1.layer.1.mlp.experts.expert_{expert}.{matrix}.{part}": tensor.clone()
        for expert in range(experts)
        for matrix, parts in matrices.items()
        for part, tensor in parts.items()
    }
    save_published(folder, dense, [layer], switch_config(experts, rows=3072, columns=768))
    return folder


def repeated(parts: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """A matrix with the same rows again and again."""
    lengths = parts["row_off"].diff().repeat(times)
    return {name: tensor.repeat(times) for name, tensor in parts.items()} | {
        "row_off": torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    }


CONVERT = """
import re
import sys
from pathlib import Path

import qmoe_format

for source in sys.argv[1:]:
    qmoe_format.convert(source, source + ".qmoe", threads=1)
    print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of memory")
def test_memory_does_not_grow_with_the_experts(tmp_path: Path) -> None:
    """32 experts more are 302 MB as bfloat16, and 151 MB as levels."""
    folders = [write_large(tmp_path / str(experts), experts) for experts in (2, 34)]
    command = [sys.executable, "-W", "ignore", "-c", CONVERT, *map(str, folders)]
    few, many = map(int, subprocess.check_output(command, text=True).split())
    assert many - few < 100_000  # kB
    with qmoe_format.open(tmp_path / "34.qmoe") as file:
        assert file.tensors["encoder.block.1.layer.1.mlp.experts.wo"].shape == (34, 768, 3072)
