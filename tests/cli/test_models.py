"""``qmoe generate`` and ``qmoe eval``."""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch

from qmoe_format import QMoEError, convert
from qmoe_format.runtime import load_model, load_tokenizer
from qmoe_format.runtime.evaluation import evaluate
from tests.conftest import Outcome
from tests.tiny_models import WORDS, save_model

Run = Callable[..., Outcome]
PROMPT = "w1 w2 w3"


@pytest.fixture(scope="module", params=["mixtral", "switch_transformers"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "checkpoint", request.param)


@pytest.fixture(scope="module")
def file(checkpoint: Path) -> Path:
    return convert(checkpoint, checkpoint.parent / "m.qmoe")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(WORDS * 4))
    return path


def test_generate_writes_what_the_model_does(qmoe: Run, file: Path) -> None:
    outcome = qmoe("generate", file, PROMPT, "--max-new-tokens", "9")
    assert (outcome.code, outcome.err) == (0, "")
    tokenizer = load_tokenizer(file)
    encoded = tokenizer(PROMPT, return_tensors="pt")
    model = load_model(file, dtype=torch.float32)
    tokens = model.generate(**encoded, max_new_tokens=9)[0]
    new = tokens if model.config.is_encoder_decoder else tokens[encoded.input_ids.shape[1] :]
    assert outcome.out.split() == tokenizer.decode(new, skip_special_tokens=True).split()


def test_generate_with_little_memory_for_experts(qmoe: Run, file: Path) -> None:
    arguments = ("generate", file, PROMPT, "--max-new-tokens", "9", "--stats")
    mapped, limited = qmoe(*arguments), qmoe(*arguments, "--expert-memory", "10kB")
    assert (mapped.code, limited.code) == (0, 0)
    assert limited.out == mapped.out
    assert "\nexperts: mapped" in mapped.err
    assert "products with packed matrices" in mapped.err
    assert "of 10.0 kB in memory" in limited.err
    for word in ("hits", "misses", "a token", "in vain", "waited", "packed: 0 B of 0 B"):
        assert word in limited.err


def test_exact_products_pack_nothing(qmoe: Run, file: Path) -> None:
    outcome = qmoe("generate", file, PROMPT, "--max-new-tokens", "9", "--stats", "--exact")
    assert outcome.code == 0
    assert "packed" not in outcome.err


def test_eval_with_little_memory_for_experts(qmoe: Run, file: Path, text: Path) -> None:
    arguments = ("eval", file, "--text", text, "--sequence-length", "24", "--json")
    assert qmoe(*arguments, "--expert-memory", "1").out == qmoe(*arguments).out


def test_generate_refuses_settings_of_the_file(qmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"bad_words_ids": 5}')
    outcome = qmoe("generate", convert(folder, tmp_path / "m.qmoe"), PROMPT)
    assert outcome.code == 1
    assert outcome.err.startswith("error[checkpoint]: transformers cannot run the compressed model")
    assert outcome.err.count("\n") == 1


def test_sampling_depends_on_the_seed(qmoe: Run, file: Path) -> None:
    def write(*options: str) -> str:
        return qmoe("generate", file, PROMPT, "--max-new-tokens", "20", *options).out

    sampled = [write("--temperature", "5", "--seed", seed) for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]
    assert sampled[0].strip()
    assert write("--seed", "1") == write()


def test_eval_against_the_original(qmoe: Run, file: Path, checkpoint: Path, text: Path) -> None:
    arguments = ["eval", file, "--text", text, "--against", checkpoint, "--sequence-length", "24"]
    outcome = qmoe(*arguments, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    compressed, original = found["cross_entropy"]["value"], found["original"]["value"]
    assert found["gap"]["value"] == pytest.approx(compressed - original)
    assert found["perplexity"] == pytest.approx(math.exp(compressed))
    assert found["kl"]["value"] > 0
    assert all(0 < error < 3 for error in found["output_errors"].values())

    shown = qmoe(*arguments).out
    assert f"{compressed:.5f}" in shown
    assert f"{original:.5f}" in shown
    assert all(name in shown for name in found["output_errors"])


def test_a_model_that_speaks_has_a_part_for_text(qmoe: Run, text: Path, tmp_path: Path) -> None:
    checkpoint = save_model(tmp_path / "checkpoint", "qwen3_omni_moe")
    file = convert(checkpoint, tmp_path / "m.qmoe")
    outcome = qmoe("generate", file, PROMPT, "--max-new-tokens", "3")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.strip()
    outcome = qmoe("eval", file, "--text", text, "--against", checkpoint, "--json")
    assert outcome.code == 0, outcome.err
    errors = json.loads(outcome.out)["output_errors"]
    assert list(errors) == [f"model.language_model.layers.{block}.mlp.experts" for block in (0, 1)]


def test_eval_alone(qmoe: Run, file: Path, text: Path) -> None:
    arguments = ["eval", file, "--text", text, "--samples", "2", "--sequence-length", "24"]
    found = json.loads(qmoe(*arguments, "--json").out)
    assert "original" not in found
    assert found["tokens"] > 0
    shown = qmoe(*arguments).out
    assert "perplexity" in shown
    assert "original" not in shown


def test_eval_against_another_checkpoint(
    qmoe: Run, file: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    name = "num_experts" if "num_experts" in config else "num_local_experts"
    for other in ("olmoe", config["model_type"]):
        changes = {} if other == "olmoe" else {name: config[name] + 1}
        folder = save_model(tmp_path / other, other, **changes)
        outcome = qmoe("eval", file, "--text", text, "--against", folder)
        assert outcome.err.startswith("error[argument]: ")
        assert "was not made from this checkpoint" in outcome.err


def test_generate_without_a_number_of_tokens(qmoe: Run, file: Path) -> None:
    """Neither the file nor the user gives one, and transformers does not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = qmoe("generate", file, PROMPT)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out


def test_eval_on_given_targets(qmoe: Run, file: Path, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "pairs.jsonl"
    text.write_text('{"text": "w1 w2 w3", "answer": "w4 w5 w6"}\n' * 3)
    outcome = qmoe("eval", file, "--text", text, "--target-column", "answer", "--json")
    if "mixtral" in (checkpoint / "config.json").read_text():
        assert outcome.err.startswith("error[argument]: ")
        assert "no encoder" in outcome.err
    else:
        assert json.loads(outcome.out)["tokens"] == 3 * 3


def test_nothing_to_predict(file: Path) -> None:
    with pytest.raises(QMoEError, match="nothing to predict"):
        evaluate(load_model(file), [])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "no.qmoe", "x"], "not-found", "no.qmoe"),
        (["generate", "{file}", ""], "argument", "no tokens"),
        (["eval", "no.qmoe", "--text", "no.jsonl"], "not-found", "no.jsonl"),
        (["eval", "no.qmoe", "--text", "{file}"], "argument", ".jsonl, .json, .txt, .parquet"),
        (["eval", "no.qmoe", "--text", "{text}", "--target-column", "a"], "argument", "no columns"),
        (
            ["eval", "{file}", "--text", "{text}", "--sequence-length", "24", "--against", "no"],
            "not-found",
            "original",
        ),
        (["eval", "{file}", "--text", "{text}", "--sequence-length", "1"], "argument", "2 or more"),
        (["generate", "{file}", "x", "--device", "cuda:99"], "argument", "cuda:99"),
        (["generate", "{file}", "x", "--temperature", "1e-300"], "argument", "0.001 or more"),
        (["generate", "{file}", "\udcff"], "argument", "not UTF-8"),
    ],
)
def test_refusals(
    qmoe: Run, file: Path, text: Path, arguments: list[str], code: str, words: str
) -> None:
    outcome = qmoe(*(part.format(file=file, text=text) for part in arguments))
    assert outcome.code == 1
    assert outcome.err.startswith(f"error[{code}]: ")
    assert words in outcome.err


@pytest.mark.parametrize("arguments", [["generate", "m.qmoe", "x"], ["eval", "m.qmoe", "--text=t"]])
def test_without_torch(qmoe: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    outcome = qmoe(*arguments)
    assert outcome.code == 1
    assert outcome.err.startswith("error[dependency]: ")
    assert "pip install 'qmoe-format[convert]'" in outcome.err
