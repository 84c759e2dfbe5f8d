"""Conversions of small checkpoints of every kind, and how they are refused or interrupted."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qmoe_format
from qmoe_format.conversion import convert
from qmoe_format.export.unpacking import unpack

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from safetensors.torch import load_file

from tests.conftest import MIXTRAL, random_state, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:the file cannot generate text")  # no tokenizer
Make = Callable[..., Path]
Change = Callable[[dict[str, Any]], object]
PREFIX = "encoder.block.1.layer.1.mlp.experts."


def nearest(w: torch.Tensor) -> torch.Tensor:
    """The decoded values of matrices [..., rows, columns], computed in float64 by the formula."""
    high = w.amax(-1, keepdim=True).clamp(min=0).bfloat16().double()
    low = w.amin(-1, keepdim=True).clamp(max=0).bfloat16().double()
    x = w.double()
    return ((x > high / 2) * high + (x < low / 2) * low).to(w.dtype)


def assert_unpacks_to(file: Path, state: dict[str, Any], folder: Path) -> None:
    unpack(file, folder)
    unpacked = load_file(folder / "model-00001-of-00001.safetensors")
    assert sorted(unpacked) == sorted(state)
    for name, tensor in state.items():
        expected = nearest(tensor) if ".experts." in name else tensor
        assert unpacked[name].dtype == tensor.dtype
        assert torch.equal(unpacked[name], expected), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("profile", ["fast", "size"])
def test_every_dtype_and_file_kind(
    switch: Make, tmp_path: Path, dtype: str, kind: str, profile: str
) -> None:
    state: dict[str, Any] = {}
    source = switch(state.update, dtype=dtype, kind=kind, shards=2, rows=33, columns=300)
    file = convert(source, tmp_path / "m.qmoe", profile=profile)
    with qmoe_format.open(file) as opened:
        opened.verify()
    assert_unpacks_to(file, state, tmp_path / "unpacked")


@pytest.mark.parametrize(
    ("experts", "rows", "columns"), [(1, 1, 1), (3, 1, 7), (2, 5, 1), (2, 1, 700), (40, 3, 4)]
)
def test_odd_shapes(switch: Make, tmp_path: Path, experts: int, rows: int, columns: int) -> None:
    state: dict[str, Any] = {}
    source = switch(state.update, experts=experts, rows=rows, columns=columns)
    file = convert(source, tmp_path / "m.qmoe", threads=3)
    with qmoe_format.open(file) as opened:
        opened.verify()
    assert_unpacks_to(file, state, tmp_path / "unpacked")


def test_zero_rows_and_zero_experts(switch: Make, tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        state[PREFIX + "expert_0.wi.weight"].zero_()
        state[PREFIX + "expert_1.wi.weight"][2:4] = 0
        state[PREFIX + "expert_2.wi.weight"].fill_(3)
        kept.update(state)

    kept: dict[str, Any] = {}
    file = convert(switch(change), tmp_path / "m.qmoe")
    with qmoe_format.open(file) as opened:
        opened.verify()
        assert opened.encoded(PREFIX + "wi", 0).levels.nonzeros == 0
    assert_unpacks_to(file, kept, tmp_path / "unpacked")


@pytest.mark.parametrize("new_names", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_names_as_published_and_those_of_transformers(
    tmp_path: Path, new_names: bool, kind: str
) -> None:
    """A matrix of each expert, or all of a layer's in one tensor."""
    state = random_state(MIXTRAL, new_names=new_names)
    source = write_checkpoint(tmp_path / "mixtral", state, MIXTRAL, kind=kind)
    assert any(tensor.ndim == 3 for tensor in state.values()) == new_names
    assert_unpacks_to(convert(source, tmp_path / "m.qmoe"), state, tmp_path / "unpacked")


def test_experts_of_several_dtypes(switch: Make, tmp_path: Path) -> None:
    """They become what transformers loads them as: the dtype of the configuration."""

    def change(state: dict[str, Any]) -> None:
        for name in state:
            if "expert_1.w" in name:
                state[name] = state[name].to(torch.float16)
        kept.update(state)

    kept: dict[str, Any] = {}
    file = convert(switch(change), tmp_path / "m.qmoe")
    loaded = {name: tensor.to(torch.bfloat16) for name, tensor in kept.items()}
    assert_unpacks_to(file, loaded, tmp_path / "unpacked")


def test_a_stale_quantization_config(switch: Make, tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    state: dict[str, Any] = {}
    file = convert(switch(state.update, config=config), tmp_path / "m.qmoe")
    assert_unpacks_to(file, state, tmp_path / "unpacked")


def test_rules(switch: Make, tmp_path: Path, qmoe: Any) -> None:
    """Those of a file come first, so that those on the command line overrule them."""
    source, file, rules = switch(), tmp_path / "m.qmoe", tmp_path / "rules.txt"
    rules.write_text("\ufeff# two rules\n\n*.wi=moqe:2:log  # small\n  *.w?=moqe:8\n", "utf-8")
    options = ("--rules", rules, "--rule", "*.wo=int4-experts", "--rule", "encoder.*.wi=moqe:3")
    assert qmoe("convert", source, file, *options).code == 0
    direct = convert(
        source, tmp_path / "direct.qmoe", rules=["*.wi=moqe:3", "*.wo=int4-experts"], threads=1
    )
    assert file.read_bytes() == direct.read_bytes()
    assert qmoe("convert", source, file, "--force", "--rules", rules).code == 0
    with qmoe_format.open(file) as opened:
        kinds = [opened.tensors[PREFIX + name].parameters["bits"] for name in ("wi", "wo")]
    assert kinds == [8, 8], "the last one that matches counts"


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (None, "io", "cannot read"),
        (b"*.wi=moqe\n*.wi\n", "argument", "rule '*.wi' is not understood"),
        (b"*.wi=moqe:5", "argument", "recipe 'moqe' has no choice '5'"),
        (b"\xff\xfe*.wi=moqe", "argument", "no stack matches"),
    ],
)
def test_rules_that_cannot_be_read(
    switch: Make, tmp_path: Path, qmoe: Any, content: bytes | None, code: str, said: str
) -> None:
    rules = tmp_path / "rules.txt"
    if content is not None:
        rules.write_bytes(content)
    done = qmoe("convert", switch(), tmp_path / "m.qmoe", "--rules", rules)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error[{code}]: ")
    assert done.err.count("\n") == 1
    assert said in done.err
    assert not (tmp_path / "m.qmoe").exists()


def test_the_callers_thread_count_of_torch_is_restored(switch: Make, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        convert(switch(), tmp_path / "m.qmoe")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def update(name: str, tensor: Any) -> Change:
    return lambda state: state.update({name: tensor})


def poison(name: str, value: float) -> Change:
    def change(state: dict[str, Any]) -> None:
        state[name][3, 2] = value

    return change


def prefix(text: str) -> Change:
    def change(state: dict[str, Any]) -> None:
        for name in list(state):
            state[text + name] = state.pop(name)

    return change


BAD: dict[str, tuple[Change, dict[str, Any] | None, str, list[str]]] = {
    "unknown type": (
        lambda state: None,
        {"model_type": "no_such_type"},
        "checkpoint",
        ["'no_such_type'", "qmoe families"],
    ),
    "wrong configuration": (
        lambda state: None,
        {"num_layers": "two"},
        "checkpoint",
        ["config.json", "num_layers"],
    ),
    "no attention": (
        lambda state: state.pop("encoder.block.1.layer.0.SelfAttention.q.weight"),
        None,
        "checkpoint",
        ["encoder.block.1.layer.0.SelfAttention.q.weight"],
    ),
    "empty": (
        update("decoder.final_layer_norm.weight", torch.zeros(0)),
        None,
        "checkpoint",
        ["decoder.final_layer_norm.weight", "[0]", "[10]"],
    ),
    "prefix": (prefix("_orig_mod."), None, "checkpoint", ["_orig_mod.encoder.block.1"]),
    "too many blocks": (
        update("encoder.block.2.layer.0.layer_norm.weight", torch.zeros(10)),
        None,
        "checkpoint",
        ["encoder.block.2.layer.0.layer_norm.weight"],
    ),
    "hole": (
        lambda state: state.pop(PREFIX + "expert_1.wi.weight"),
        None,
        "checkpoint",
        ["expert 1 of 4", PREFIX + "expert_1.wi.weight"],
    ),
    "fewer than the config says": (
        lambda state: [state.pop(PREFIX + f"expert_3.{m}.weight") for m in ("wi", "wo")],
        None,
        "checkpoint",
        ["expert 3 of 4"],
    ),
    "unequal": (
        update(PREFIX + "expert_2.wo.weight", torch.zeros(9, 6, dtype=torch.bfloat16)),
        None,
        "checkpoint",
        [PREFIX + "expert_2.wo.weight", "[9, 6]", "[10, 6]"],
    ),
    "like an expert": (
        update(PREFIX + "expert_2.wi.bias", torch.zeros(6)),
        None,
        "checkpoint",
        [PREFIX + "expert_2.wi.bias"],
    ),
    "NaN": (
        poison(PREFIX + "expert_2.wi.weight", math.nan),
        None,
        "value",
        [PREFIX + "expert_2.wi.weight", "row 3, column 2", "nan"],
    ),
    "infinity": (
        poison(PREFIX + "expert_1.wo.weight", -math.inf),
        None,
        "value",
        [PREFIX + "expert_1.wo.weight", "row 3, column 2", "-inf"],
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("old", [None, b"an older file"])
def test_bad_checkpoints_change_nothing(
    switch: Make, tmp_path: Path, qmoe: Any, case: str, old: bytes | None
) -> None:
    change, config, code, named = BAD[case]
    source = switch(change, config=config)
    target = tmp_path / "out" / "m.qmoe"
    target.parent.mkdir()
    if old:
        target.write_bytes(old)
    done = qmoe("convert", source, target, "--force")
    assert done.code == 1
    assert not done.out
    assert done.err.startswith(f"error[{code}]: ")
    assert done.err.count("\n") == 1
    assert all(part in done.err for part in named), done.err
    assert [path.read_bytes() for path in target.parent.iterdir()] == ([old] if old else [])


def test_missing_shard(switch: Make, tmp_path: Path, qmoe: Any) -> None:
    source = switch(shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    done = qmoe("convert", source, tmp_path / "m.qmoe")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error[checkpoint]: ")
    assert "model-00002-of-00003.safetensors" in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "m.qmoe").exists()


def test_existing_files_are_kept_unless_forced(switch: Make, tmp_path: Path, qmoe: Any) -> None:
    source, target = switch(), tmp_path / "m.qmoe"
    target.write_bytes(b"precious")
    done = qmoe("convert", source, target)
    assert done.code == 1
    assert done.err.startswith("error[argument]: ")
    assert "--force" in done.err
    assert target.read_bytes() == b"precious"
    assert qmoe("convert", source, target, "--force").code == 0
    assert qmoe("verify", target).code == 0


def test_shards_of_another_model_are_kept_unless_forced(
    switch: Make, tmp_path: Path, qmoe: Any
) -> None:
    other = tmp_path / "m-00001-of-00009.qmoe"
    other.write_bytes(b"precious")
    arguments = ("convert", switch(), tmp_path / "m.qmoe", "--shard-size", "1kB")
    done = qmoe(*arguments)
    assert done.code == 1
    assert other.name in done.err
    assert sorted(tmp_path.glob("*.qmoe")) == [other]
    assert qmoe(*arguments, "--force").code == 0
    assert qmoe("verify", tmp_path / "m.qmoe").code == 0


@pytest.mark.parametrize("place", ["nowhere/m.qmoe", "folder"])
def test_destinations_that_cannot_be_written(
    switch: Make, tmp_path: Path, qmoe: Any, place: str
) -> None:
    (tmp_path / "folder").mkdir()
    done = qmoe("convert", switch(), tmp_path / place, "--force")
    assert done.code == 1
    assert str(tmp_path) in done.err
    assert not list((tmp_path / "folder").iterdir())


def test_a_missing_source(tmp_path: Path, qmoe: Any) -> None:
    done = qmoe("convert", tmp_path / "nowhere", tmp_path / "m.qmoe")
    assert done.code == 1
    assert done.err.startswith("error[not-found]: ")


@pytest.mark.parametrize("package", ["torch", "safetensors", "transformers"])
def test_missing_packages(
    switch: Make, tmp_path: Path, qmoe: Any, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    source = switch()
    monkeypatch.setitem(sys.modules, package, None)
    done = qmoe("convert", source, tmp_path / "m.qmoe")
    assert done.code == 1
    assert done.err.startswith("error[dependency]: ")
    assert "pip install 'qmoe-format[convert]'" in done.err


def test_reading_needs_no_torch(switch: Make, tmp_path: Path) -> None:
    file = convert(switch(), tmp_path / "m.qmoe")
    code = (
        "import sys\nsys.modules.update(dict.fromkeys(['torch', 'safetensors', 'transformers']))\n"
        "from qmoe_format.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    for command in ("inspect", "verify", "unpack"):
        folder = [str(tmp_path / "unpacked")] if command == "unpack" else []
        arguments = [sys.executable, "-c", code, command, str(file), *folder]
        subprocess.run(arguments, check=True, capture_output=True)


BUSY = r"""
import sys, time
from qmoe_format.conversion import encoding
from qmoe_format.cli import main
encode_matrix = encoding.encode_matrix
def slow(*arguments, **options):
    sys.stdout.write("busy\n")
    sys.stdout.flush()
    time.sleep(0.3)
    return encode_matrix(*arguments, **options)
encoding.encode_matrix = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_interrupted(switch: Make, tmp_path: Path, qmoe: Any, number: int, code: int) -> None:
    source = switch(experts=40)
    target = tmp_path / "out" / "m.qmoe"
    target.parent.mkdir()
    convert(switch(name="older"), target)
    before = target.read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, "convert", source, target, "--force"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # These tests may be a background job of a shell, which starts it with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout
    for _ in range(3):
        assert "busy" in process.stdout.readline()
    assert target.read_bytes() == before
    assert len(list(target.parent.iterdir())) == 2, "it is being written next to the old one"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert target.read_bytes() == before
    if number == signal.SIGKILL:
        assert qmoe("convert", source, target, "--force").code == 0
        assert qmoe("verify", target).code == 0
    else:
        assert list(target.parent.iterdir()) == [target]
        assert errors == ("interrupted; no partial files are left\n" if code == 130 else "")


def test_disk_full(switch: Make, tmp_path: Path) -> None:
    source = switch(rows=256, columns=512)
    target = tmp_path / "out" / "m.qmoe"
    target.parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "qmoe_format.cli", "convert", source, target],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error[io]: ")
    assert done.stderr.count("\n") == 1
    assert not list(target.parent.iterdir())


def test_a_terminal_that_lacks_characters(switch: Make, tmp_path: Path) -> None:
    file = convert(switch(), tmp_path / "m.qmoe")
    done = subprocess.run(
        [sys.executable, "-m", "qmoe_format.cli", "inspect", file],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert b"\\xd7" in done.stdout


def test_progress_counts_every_weight(switch: Make, tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    seen: list[tuple[int, int]] = []
    convert(switch(state.update), tmp_path / "m.qmoe", progress=lambda *at: seen.append(at))
    total = sum(tensor.numel() for tensor in state.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_progress_on_a_terminal_is_on_stderr_only(switch: Make, tmp_path: Path) -> None:
    import pty

    master, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", BUSY, "convert", switch(), tmp_path / "m.qmoe"],
        stdout=subprocess.PIPE,
        stderr=slave,
        check=True,
    )
    os.close(slave)
    shown = os.read(master, 100_000).decode()
    os.close(master)
    assert "weights/s" in shown
    assert shown.endswith("\r\x1b[K")
    assert b"weights/s" not in done.stdout


def test_closed_output(switch: Make, tmp_path: Path) -> None:
    file = convert(switch(), tmp_path / "m.qmoe")
    process = subprocess.Popen(
        [sys.executable, "-m", "qmoe_format.cli", "inspect", file, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


def test_files_that_are_not_qmoe_files(tmp_path: Path, qmoe: Any) -> None:
    bad = tmp_path / "bad.qmoe"
    bad.write_bytes(b"\x8fQMOE")
    for path, code in ((bad, "truncated"), (tmp_path / "nowhere", "not-found"), (tmp_path, "io")):
        for command in (["inspect"], ["inspect", "--json"], ["verify"], ["unpack"]):
            extra = [tmp_path / "folder"] if command == ["unpack"] else []
            done = qmoe(*command, path, *extra)
            assert (done.code, done.out) == (1, "")
            assert done.err.startswith(f"error[{code}]: ")
            assert done.err.count("\n") == 1
            assert not (tmp_path / "folder").exists()
