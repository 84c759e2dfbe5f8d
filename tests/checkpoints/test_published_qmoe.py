"""Reading checkpoints that QMoE's authors publish: good ones, and what is wrong with bad ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qmoe_format.checkpoints.published_qmoe import dictionary, open_published
from qmoe_format.checkpoints.published_qmoe.checkpoint import corrected
from qmoe_format.checkpoints.published_qmoe.matrix import PublishedMatrix
from qmoe_format.checkpoints.torch_dtypes import to_storage
from qmoe_format.errors import QMoEError
from tests.checkpoints import published_folder as published
from tests.checkpoints.published_folder import packed, ternary, write_published
from tests.conftest import random_state, switch_config
from tests.refusals import refusal

PREFIX = "encoder.block.1.layer.1.mlp.experts."
MATRIX = f"{PREFIX}expert_2.wi"
Parts = dict[str, Any]


@pytest.fixture
def state() -> dict[str, Tensor]:
    """4 experts of 9 x 35 weights, and of 35 x 9."""
    made = random_state(switch_config(rows=9, columns=35))
    experts = [name for name in made if ".experts." in name]
    return made | {name: ternary(made[name].shape, seed) for seed, name in enumerate(experts)}


@pytest.fixture
def folder(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    return write_published(tmp_path / "published", state, switch_config(rows=9, columns=35))


def matrix(parts: Parts, columns: int) -> PublishedMatrix:
    """Of what ``packed`` returns."""
    return PublishedMatrix(
        "here",
        parts["w_comp"].numpy().view(np.uint16),
        parts["row_off"].numpy(),
        to_storage(parts["ter_minmax"]).reshape(-1, 2),
        columns,
    )


def test_the_dictionary() -> None:
    entries, pairs = dictionary.entries()
    level = [0, -1, 1]
    for entry, count, sequence in zip(entries, pairs, published.dictionary(), strict=True):
        assert count == len(sequence)
        expected = [level[symbol] for pair in sequence for symbol in (pair % 3, pair // 3)]
        assert entry.tolist() == expected + [0] * (28 - len(expected))


def test_other_arithmetic_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionary, "_ZERO", np.longdouble("0.885"))
    said = refusal(dictionary.sequences.__wrapped__, "checkpoint")
    assert "arithmetic does not give QMoE's dictionary" in said


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 90), st.integers(0, 2**31), st.integers(1, 3))
def test_rows_decode_as_a_slow_reader_decodes_them(
    rows: int, columns: int, seed: int, threads: int
) -> None:
    weights = ternary((rows, columns), seed)
    parts = packed(weights)
    found = matrix(parts, columns).levels(threads)
    offsets, codes = parts["row_off"].tolist(), parts["w_comp"].numpy().view(np.uint16)
    for row, (low, high) in enumerate(parts["ter_minmax"].reshape(-1, 2)):
        symbols = published.decode_row(codes[offsets[row] : offsets[row + 1]], columns)
        values = torch.stack([torch.tensor(0.0), low, high])[symbols].bfloat16()
        assert values.equal(weights[row])
        levels = torch.tensor([0, -1, 1])[symbols] * (values != 0)
        assert levels.tolist() == found[row].tolist()


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_whatever_is_in_a_matrix_it_is_decoded_or_refused(data: Any) -> None:
    parts = packed(ternary((3, data.draw(st.integers(1, 60))), 1))
    columns = data.draw(st.integers(1, 60))
    for part, bits in (("w_comp", 16), ("row_off", 32), ("ter_minmax", 16)):
        array = parts[part].view(torch.int16 if bits == 16 else torch.int32).numpy()
        places = data.draw(st.lists(st.integers(0, array.size - 1), max_size=2))
        for place in places:
            small = st.integers(0, 30)
            array[place] = data.draw(small | st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    try:
        levels = matrix(parts, columns).levels()
    except QMoEError as error:
        assert error.code == "checkpoint"
    else:
        assert levels.shape == (3, columns)
        assert {*levels.flat} <= {-1, 0, 1}


def test_a_folder(folder: Path, state: dict[str, Tensor]) -> None:
    with open_published(folder) as checkpoint:
        checkpoint.check_complete()
        wi, wo = checkpoint.stacks
        assert [wi.name, wo.name] == [f"{PREFIX}wi", f"{PREFIX}wo"]
        assert (wi.experts, wi.rows, wi.columns, wi.dtype) == (4, 9, 35, "BF16")
        assert (wo.rows, wo.columns, wo.members) == (35, 9, f"{PREFIX}expert_{{}}.wo.weight")
        assert checkpoint.tensors.keys() == state.keys()
        for name, tensor in state.items():
            assert checkpoint.read(name).view(torch.int16).equal(tensor.view(torch.int16)), name
        scales = checkpoint.matrix(wi, 3).scales
        weights = state[wi.member(3)]
        assert np.array_equal(scales[:, 0], to_storage(weights.min(1)[0]))
        assert np.array_equal(scales[:, 1], to_storage(weights.max(1)[0]))
        parts = torch.load(folder / "exp00.pt")
        assert checkpoint.stored_bytes([f"{MATRIX}.weight", "shared.weight"]) == (
            sum(parts[f"{MATRIX}.{part}"].nbytes for part in ("w_comp", "row_off", "ter_minmax"))
            + state["shared.weight"].nbytes
        )


def test_one_file_of_experts_is_mapped_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = switch_config() | {"num_layers": 4, "num_sparse_encoder_layers": 2}
    state = random_state(config)
    experts = {name: ternary(state[name].shape) for name in state if ".experts." in name}
    folder = write_published(tmp_path / "published", state | experts, config)
    with open_published(folder) as checkpoint:
        shards = {checkpoint._shard(name).path.name: checkpoint._shard(name) for name in experts}
        assert sorted(shards) == ["exp00.pt", "exp01.pt"]
        for stack in checkpoint.stacks:
            matrices = [checkpoint.matrix(stack, expert) for expert in range(stack.experts)]
            assert sum(shard._opened is not None for shard in shards.values()) == 1
        last, before = shards["exp01.pt"], shards["exp01.pt"]._opened
        checkpoint._matrices_release_after = 0
        again = checkpoint.matrix(stack, 3)
        assert last._opened is not before
        assert np.array_equal(again.codewords, matrices[3].codewords)  # a view outlives its map


def test_all_blocks_are_sparse() -> None:
    """As Switch-C: what its ``config.json`` says of sparse layers is wrong."""
    config = {
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "encoder_sparse_step": 5,
        "decoder_sparse_step": 2,
        "is_full_sparse": True,
    }
    name = "{}.block.{}.layer.1.mlp.experts.expert_0.wi.weight"
    names = [name.format("encoder", 0), name.format("encoder", 1), name.format("decoder", 1)]
    assert corrected(config, names) == {
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "decoder_sparse_step": 2,
    }


def change(folder: Path, edit: Callable[[Parts], object], file: str = "exp00.pt") -> str:
    """The message of the refusal of a folder in one of whose files something is changed."""
    parts = torch.load(folder / file)
    edit(parts)
    torch.save(parts, folder / file)
    return refused(folder)


def refused(folder: Path) -> str:
    """The message, whether opening is refused, the check, or to read all experts."""

    def read() -> None:
        with open_published(folder) as checkpoint:
            checkpoint.check_complete()
            for stack in checkpoint.stacks:
                for expert in range(stack.experts):
                    checkpoint.matrix(stack, expert).levels()

    return refusal(read, "checkpoint")


def edited(part: str, change: Callable[[Tensor], object]) -> Callable[[Parts], object]:
    """Change a part of ``MATRIX`` in place, or let the returned tensor replace it."""

    def edit(parts: Parts) -> None:
        name = f"{MATRIX}.{part}"
        found = change(parts[name])
        parts[name] = found if isinstance(found, Tensor) else parts[name]

    return edit


def put(place: int, value: int) -> Callable[[Tensor], object]:
    return lambda tensor: tensor.__setitem__(place, value)


def longest(tensor: Tensor) -> None:
    """A codeword of 28 weights in place of the last one."""
    tensor[-1] = next(n for n, each in enumerate(published.dictionary()) if len(each) == 14)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (edited("row_off", put(0, 1)), "row_off begins with 1, not with 0"),
        (edited("row_off", put(3, 1)), "row_off falls after row 2"),
        (edited("row_off", put(3, -5)), "row_off falls after row 2"),
        (edited("row_off", put(-1, 10**6)), "row_off ends with 1000000, but there are"),
        (edited("w_comp", longest), "the codewords of row 8 hold more than 35 weights"),
        (edited("row_off", put(1, 0)), "the codewords of row 0 hold fewer than 35 weights"),
        (edited("w_comp", lambda t: t.int()), "w_comp' is I32 [125] instead of I16"),
        (edited("w_comp", lambda t: t[None]), "w_comp' is I16 [1, 125] instead of I16 of one dim"),
        (edited("row_off", lambda t: t.long()), "row_off' is I64 [10] instead of I32"),
        (edited("ter_minmax", lambda t: t.float()), "ter_minmax' is F32 [18] instead of BF16"),
        (edited("ter_minmax", lambda t: t[1:]), "ter_minmax' has 17 elements, not two for each"),
        (edited("row_off", lambda t: t[:0]), "ter_minmax' has 18 elements, not two for each"),
        (edited("w_comp", lambda t: t[:17]), "has 17 codewords, too few for 9 x 35 weights"),
        (edited("w_comp", lambda t: t[:1].expand(1 << 40)), "has fewer elements than its shape"),
        (lambda parts: parts.pop(f"{MATRIX}.row_off"), f"'{MATRIX}.row_off' is missing"),
        (
            lambda parts: [parts.pop(n) for n in [*parts] if n.startswith(f"{MATRIX}.")],
            f"'{MATRIX}' is missing",
        ),
        (
            lambda parts: [parts.pop(n) for n in [*parts] if "expert_2" in n],
            "sizes.pt: lists 125 codewords of",
        ),
        (lambda parts: parts.update(x=torch.ones(2)), "'x' is no part of an expert"),
        (
            lambda parts: parts.update({f"{MATRIX}.bias": torch.ones(2)}),
            f"'{MATRIX}.bias' is no part of an expert",
        ),
    ],
)
def test_damaged_experts(folder: Path, edit: Callable[[Parts], object], words: str) -> None:
    assert words in change(folder, edit)


def test_a_weight_beyond_an_odd_width(folder: Path) -> None:
    def edit(parts: Parts) -> None:
        weights = torch.ones(9, 36, dtype=torch.bfloat16)
        parts.update({f"{MATRIX}.{part}": tensor for part, tensor in packed(weights).items()})
        sizes = torch.load(folder / "sizes.pt")
        torch.save(sizes | {MATRIX: parts[f"{MATRIX}.w_comp"].numel()}, folder / "sizes.pt")

    assert "the codewords of row 0 hold a non-zero weight after 35 weights" in change(folder, edit)


def test_huge_shapes_are_not_allocated(folder: Path) -> None:
    """Two matrices of 10^6 rows each would be 10^6 columns wide."""

    def edit(parts: Parts) -> None:
        for each in ("wi", "wo"):
            parts[f"{PREFIX}expert_2.{each}.row_off"] = torch.zeros(1_000_001, dtype=torch.int32)
            scales = torch.zeros(2_000_000, dtype=torch.bfloat16)
            parts[f"{PREFIX}expert_2.{each}.ter_minmax"] = scales

    assert "too few for 1000000 x 1000000 weights" in change(folder, edit)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda sizes: sizes.update({MATRIX: 7}),
            f"lists 7 codewords of '{MATRIX}', but there are 1",
        ),
        (lambda sizes: sizes.update({MATRIX: torch.ones(3)}), f"lists no codewords of '{MATRIX}'"),
        (lambda sizes: sizes.pop(MATRIX), f"lists no codewords of '{MATRIX}', but there are 125"),
        (lambda sizes: sizes.update(x=1), "lists 1 codewords of 'x', but there are none"),
    ],
)
def test_sizes_that_disagree(folder: Path, edit: Callable[[Parts], object], words: str) -> None:
    assert f"sizes.pt: {words}" in change(folder, edit, "sizes.pt")


def test_sizes_that_are_no_dict(folder: Path) -> None:
    torch.save([1, 2], folder / "sizes.pt")
    assert "sizes.pt: holds something other than numbers by name" in refused(folder)


@pytest.mark.parametrize("name", ["noexp.pt", "exp00.pt", "sizes.pt"])
@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100)])
def test_files_that_torch_has_not_written(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert f"{name}: torch.load cannot map it" in refused(folder)


@pytest.mark.parametrize("name", ["noexp.pt", "exp00.pt", "sizes.pt"])
def test_a_file_that_ends_early(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    assert f"{name}: torch.load cannot map it" in refused(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("noexp.pt", "noexp.pt: this weight file is missing"),
        ("exp00.pt", "sizes.pt: lists "),
        ("sizes.pt", "sizes.pt: missing"),
        ("config.json", "config.json: no JSON object"),
    ],
)
def test_a_missing_file(folder: Path, name: str, words: str) -> None:
    (folder / name).unlink()
    assert words in refused(folder)


@pytest.mark.parametrize("name", ["noexp.pt", "exp00.pt", "sizes.pt"])
def test_a_pipe_in_place_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name}: not a file" in refused(folder)


def test_a_layer_without_its_file(folder: Path) -> None:
    (folder / "exp00.pt").unlink()
    torch.save({}, folder / "sizes.pt")
    assert f"experts are missing: there are none for '{PREFIX[:-1]}'" in refused(folder)


def test_a_layer_in_two_files(folder: Path) -> None:
    shutil.copy(folder / "exp00.pt", folder / "exp01.pt")
    assert "exp01.pt: tensor " in (said := refused(folder))
    assert "is in exp00.pt, too" in said


def test_a_dense_weight_is_missing(folder: Path) -> None:
    said = change(folder, lambda dense: dense.pop("encoder.final_layer_norm.weight"), "noexp.pt")
    assert "no weights for 'encoder.final_layer_norm.weight'" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_ff": 10}, "has shape [4, 9, 35], but by config.json experts are [4, 10, 35]"),
        ({"d_model": 36}, "but by config.json experts are [4, 9, 36]"),
        ({"num_experts": 5}, "expert 4 of 5 is missing"),
        ({"num_experts": 3}, "but by config.json experts are [3, 9, 35]"),
        ({"model_type": "mixtral"}, "transformers' model has none of that name"),
        ({"num_layers": 10**9}, "config.json: 'num_layers' is 1000000000"),
    ],
)
def test_another_config(folder: Path, changes: dict[str, Any], words: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert words in refused(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_config_that_is_no_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json: no JSON object" in refused(folder)
