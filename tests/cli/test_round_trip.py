"""convert, verify, inspect, unpack and load the real checkpoints in ../shared/data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import qmoe_format

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")

Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Converted:
    source: Path
    file: Path
    unpacked: Path
    output: str


@pytest.fixture(scope="module", params=["switch-mini", "mixtral-mini"])
def converted(
    request: pytest.FixtureRequest,
    shared_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
    qmoe_process: Any,
) -> Converted:
    folder = tmp_path_factory.mktemp(request.param)
    source, file, unpacked = shared_data / request.param, folder / "m.qmoe", folder / "unpacked"
    done = qmoe_process("convert", source, file)
    assert (done.code, done.err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["m.qmoe"]
    result = qmoe_process("unpack", file, unpacked, "--shard-size", "10MB")
    assert (result.code, result.err) == (0, "")
    return Converted(source, file, unpacked, done.out)


def read_safetensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of all tensors, read by neither safetensors nor this package."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, entry in header.items():
            first, last = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = (entry["dtype"], entry["shape"], data[first:last])
    return tensors


def rounded(bits: Bits) -> Bits:
    """Round bfloat16 [rows, columns] to the nearest of each row's minimum, 0 and maximum."""
    w = (bits.astype(np.uint32) << 16).view(np.float32)
    high = np.maximum(w.max(1, keepdims=True), 0)
    low = np.minimum(w.min(1, keepdims=True), 0)
    values = np.where(w > high / 2, high, np.where(w < low / 2, low, np.float32(0)))
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def test_experts_are_rounded_and_all_else_is_kept_byte_for_byte(converted: Converted) -> None:
    before, after = read_safetensors(converted.source), read_safetensors(converted.unpacked)
    assert sorted(before) == sorted(after)
    changed = 0
    for name, (dtype, shape, data) in before.items():
        assert after[name][:2] == (dtype, shape)
        if ".experts." in name:
            changed += 1
            expected = rounded(np.frombuffer(data, np.uint16).reshape(shape))
            assert after[name][2] == expected.tobytes(), name
        else:
            assert after[name][2] == data, name
    assert changed == {"switch-mini": 128, "mixtral-mini": 96}[converted.source.name]


def test_small_files_are_kept_byte_for_byte(converted: Converted) -> None:
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in names:
        assert (converted.unpacked / name).read_bytes() == (converted.source / name).read_bytes()
    others = {path.name for path in converted.unpacked.iterdir()} - names
    assert others - {"model.safetensors.index.json"} == {
        path.name for path in converted.unpacked.glob("model-*-of-*.safetensors")
    }


def test_shards_have_the_requested_size_and_an_index(converted: Converted) -> None:
    index = json.loads((converted.unpacked / "model.safetensors.index.json").read_text())
    shards = sorted(converted.unpacked.glob("*.safetensors"))
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert len(shards) > 2
    assert all(path.stat().st_size < 10_000_000 + 20_000 for path in shards)
    sizes = [len(data) for _, _, data in read_safetensors(converted.unpacked).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_transformers_loads_the_rounded_model(converted: Converted) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)  # more are slow when other programs are busy
    kind = "AutoModelForSeq2SeqLM" if "switch" in converted.source.name else "AutoModelForCausalLM"
    load = getattr(transformers, kind).from_pretrained
    model, report = load(converted.unpacked, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    original = load(converted.source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted.unpacked)
    batch = tokenizer("A mixture of experts is", return_tensors="pt")
    with torch.inference_mode():
        if "switch" in converted.source.name:
            batch["decoder_input_ids"] = batch["input_ids"]
        difference = model(**batch).logits - original(**batch).logits
    assert 0 < difference.abs().mean() < 3
    assert model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=4).shape[0] == 1


def test_verify(converted: Converted, qmoe: Any) -> None:
    done = qmoe("verify", converted.file)
    assert (done.code, done.err) == (0, "")
    assert "good" in done.out


def test_every_byte_is_checked(converted: Converted, qmoe: Any, tmp_path: Path) -> None:
    data = bytearray(converted.file.read_bytes())
    data[len(data) // 2] ^= 4
    bad = tmp_path / "bad.qmoe"
    bad.write_bytes(data)
    done = qmoe("verify", bad)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error[checksum]: ")
    assert done.err.count("\n") == 1


def test_json_has_exactly_the_documented_keys(converted: Converted, qmoe_process: Any) -> None:
    done = qmoe_process("inspect", converted.file, "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert list(report) == ["format", "source_format", "tensors", "totals"]
    assert report["source_format"] == "BF16"
    with qmoe_format.open(converted.file) as file:
        assert report["format"] == {"version": f"{file.version[0]}.{file.version[1]}"}
        assert [tensor["name"] for tensor in report["tensors"]] == list(file.tensors)
        for tensor in report["tensors"]:
            assert list(tensor) == [
                "name",
                "encoding",
                "shape",
                "dtype",
                "bytes",
                "total_bits_per_weight",
                "payload_bits_per_weight",
                "zero_fraction",
                "refinement_bits_per_weight",
                "refinement_zero_fraction",
            ]
            entry = file.tensors[tensor["name"]]
            weights = np.prod(tensor["shape"])
            assert tensor["bytes"] == entry.stored_bytes
            assert tensor["total_bits_per_weight"] == pytest.approx(
                8 * entry.stored_bytes / weights
            )
            if tensor["encoding"] != "int-dict":
                assert tensor["zero_fraction"] is None
                continue
            assert tensor["payload_bits_per_weight"] < tensor["total_bits_per_weight"] < 2
            zeros = [file.read_expert(tensor["name"], e) == 0 for e in range(tensor["shape"][0])]
            assert tensor["zero_fraction"] == pytest.approx(np.mean(zeros))


def test_totals_add_up(converted: Converted, qmoe: Any) -> None:
    report = json.loads(qmoe("inspect", converted.file, "--json").out)
    totals, tensors = report["totals"], report["tensors"]
    experts = [tensor for tensor in tensors if ".experts." in tensor["name"]]
    weights = sum(int(np.prod(tensor["shape"])) for tensor in experts)
    assert totals["experts"]["weights"] == weights
    assert totals["experts"]["bf16_bytes"] == 2 * weights
    stored = sum(tensor["bytes"] for tensor in experts) + totals["dictionary_bytes"]
    assert totals["experts"]["bytes"] == stored
    assert totals["experts"]["ratio"] == pytest.approx(2 * weights / stored)
    assert totals["experts"]["total_bits_per_weight"] == pytest.approx(8 * stored / weights)
    assert totals["file"]["bytes"] == converted.file.stat().st_size
    original = read_safetensors(converted.source)
    assert totals["file"]["bf16_bytes"] == sum(len(data) for _, _, data in original.values())
    parts = stored + totals["others"]["bytes"] + totals["attachment_bytes"]
    assert parts < totals["file"]["bytes"] < parts + 64 * 1000


def test_table(converted: Converted, qmoe: Any) -> None:
    done = qmoe("inspect", converted.file)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    with qmoe_format.open(converted.file) as file:
        for name in file.tensors:
            assert sum(line.split()[:1] == [name] for line in lines) == 1
    assert any(line.startswith("experts") and "×" in line for line in lines)
    assert max(map(len, lines)) < 140
    assert lines[-1] in converted.output, "convert ends with the same summary"


@pytest.mark.parametrize("profile", ["fast", "size"])
def test_threads_do_not_change_a_byte(shared_data: Path, tmp_path: Path, profile: str) -> None:
    from qmoe_format.conversion import convert

    source = shared_data / "mixtral-mini"
    files = [
        convert(source, tmp_path / f"{i}.qmoe", profile=profile, threads=threads)
        for i, threads in enumerate([1, 2, 2, 3])
    ]
    assert len({file.read_bytes() for file in files}) == 1


def test_shards(shared_data: Path, tmp_path: Path, qmoe: Any, converted: Converted) -> None:
    target = tmp_path / "m.qmoe"
    done = qmoe("convert", converted.source, target, "--shard-size", "4MB")
    assert (done.code, done.err) == (0, "")
    index = Path(done.out.partition(": written")[0])
    assert len(list(tmp_path.glob("*.qmoe"))) > 1
    assert qmoe("verify", index).code == 0
    whole = json.loads(qmoe("inspect", converted.file, "--json").out)
    parts = json.loads(qmoe("inspect", index, "--json").out)
    assert parts["totals"]["file"]["bytes"] == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert [t["name"] for t in parts["tensors"]] == [t["name"] for t in whole["tensors"]]
    assert qmoe("unpack", index, tmp_path / "unpacked").code == 0
    assert read_safetensors(tmp_path / "unpacked") == read_safetensors(converted.unpacked)
