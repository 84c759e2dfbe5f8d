"""Options of ``qmoe convert`` and arguments of ``convert`` that are about calibration."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qmoe_format
from qmoe_format.calibration.text import text_sha256
from qmoe_format.codec import EncodedMatrix
from qmoe_format.codec.segments import decode
from qmoe_format.conversion import Calibration, convert
from qmoe_format.errors import QMoEError

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--samples", "3"], "--samples applies to calibration text"),
        (["--text-column", "body"], "--text-column applies to"),
        (["--device", "cpu"], "--device applies to"),
        (["--recipe", "rd"], "'rd' needs calibration text"),
        (["--recipe", "qmoe"], "'qmoe' needs calibration text"),
        (["--bits-per-weight", "0.8"], "'rtn' has one size only"),
        (["--lambda", "0.8"], "'rtn' has one size only"),
        (["--resume"], "can be resumed"),
        (["--calibration", "TEXT", "--recipe", "rtn"], "'rtn' does not use calibration text"),
        (["--calibration", "TEXT", "--recipe", "qmoe", "--lambda", "1"], "one size only"),
        (["--levels", "3"], "'rtn' has no 'levels'; use it with rd"),
        (["--effort", "high"], "'rtn' has no 'effort'; use it with rd"),
        (["--bits", "4"], "'rtn' has no 'bits'; use it with gptq or moqe or finequant"),
        (["--recipe", "moqe", "--bits", "5"], "'moqe' does not have bits 5"),
        (["--recipe", "int4-experts", "--grid", "log"], "no 'grid'; use it with moqe"),
        (["--rule", "*=gptq"], "'gptq' needs calibration text"),
        (["--rule", "experts"], "rule 'experts' is not understood"),
        (["--calibration", "TEXT", "--rule", "*.w2=rtn"], "no stack matches '*.w2'"),
        (["--calibration", "TEXT", "--device", "abacus"], "'abacus' cannot be used"),
        (["--calibration", "TEXT", "--text-column", "body"], "no column 'body'"),
        (["--calibration", "TEXT", "--sequence-length", "1"], "2 or more"),
    ],
)
def test_what_makes_no_sense(
    switch_folder: Path, text: Path, tmp_path: Path, qmoe: Any, options: list[str], said: str
) -> None:
    options = [str(text) if option == "TEXT" else option for option in options]
    done = qmoe("convert", switch_folder, tmp_path / "m.qmoe", *options)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error[argument]: ")
    assert said in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ["--bits-per-weight", "1", "--lambda", "1"],
        ["--bits-per-weight", "0"],
        ["--lambda", "nan"],
        ["--token-cap", "many"],
        ["--samples", "0"],
        ["--seed", "-1"],
        ["--bits", "0"],
        ["--levels", "5"],
        ["--effort", "5"],
        ["--grid", "sine"],
        ["--recipe", "gptq9"],
    ],
)
def test_wrong_usage(qmoe: Any, options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        qmoe("convert", "a", "b", "--calibration", "c", *options)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Calibration("text.txt", token_cap=0), "token_cap"),
        (lambda: convert("a", "b", calibration="c", bits_per_weight=-1.0), "bits_per_weight"),
        (lambda: convert("a", "b", calibration="c", rate_lambda=float("inf")), "rate_lambda"),
        (lambda: convert("a", "b", calibration="c", rate_lambda=1.0, bits_per_weight=1.0), "one"),
    ],
)
def test_wrong_arguments(make: Callable[[], object], said: str) -> None:
    with pytest.raises(QMoEError, match=said) as caught:
        make()
    assert caught.value.code == "argument"


def test_everything_on_the_command_line(
    switch_folder: Path, text: Path, tmp_path: Path, qmoe: Any
) -> None:
    options = (
        f"--calibration {text} --text-column text --sequence-length 24 --samples 9 --seed 3 "
        "--token-cap 2.5 --mask-special-tokens --all-experts --device cpu --lambda 0.1 --recipe rd "
        "--profile fast --threads 1"
    ).split()
    file = tmp_path / "m.qmoe"
    done = qmoe("convert", switch_folder, file, *options)
    assert (done.code, done.err) == (0, "")
    direct = convert(
        switch_folder,
        tmp_path / "direct.qmoe",
        calibration=Calibration(text, "text", None, 24, 9, 3, 2.5, True, "cpu", True),
        rate_lambda=0.1,
        threads=1,
    )
    assert file.read_bytes() == direct.read_bytes()
    shown = qmoe("inspect", file, "--quality").out.splitlines()
    assert shown[0] == f"recipe rd, text with SHA-256 {text_sha256(text)}"
    least, most = shown[1].partition(" bits/weight, lambda ")[2].split(" to ")
    assert float(least) <= 0.1 <= float(most)
    columns = ("bits/weight", "kurtosis", "levels", "zeros")
    places = [shown[3].index(column) for column in columns]
    assert places == sorted(places)
    assert shown[3].split()[-3:] == list(columns[1:])
    row = re.fullmatch(
        r"decoder\.block\.1\.layer\.2\.mlp\.experts\.wi +4 +0 .* "
        r"(\d+\.\d)  +(\d+) / \d+ / (\d+)  +(\d+) %",
        shown[5],
    )
    assert row
    (stack, *_) = json.loads(qmoe("inspect", file, "--quality", "--json").out)["stacks"]
    kurtosis, levels, zeros = (
        [expert[name] for expert in stack["experts"]] for name in ("kurtosis", "levels", "zeros")
    )
    assert row.groups() == (
        f"{sum(kurtosis) / 4:.1f}", f"{min(levels)}", f"{max(levels)}", f"{25 * sum(zeros):.0f}"
    )  # fmt: skip
    with qmoe_format.open(file) as opened:
        for expert, (count, share) in enumerate(zip(levels, zeros, strict=True)):
            values = opened.read_expert(stack["name"], expert)
            assert share == (values == 0).mean()
            encoded = opened.encoded(stack["name"], expert)
            assert isinstance(encoded, EncodedMatrix)
            assert count == 2 * np.abs(decode(encoded.levels)).max() + 1


def test_a_report_that_is_there_stays(
    switch_folder: Path, text: Path, tmp_path: Path, qmoe: Any
) -> None:
    report = tmp_path / "m.quality.json"
    report.write_text("precious")
    arguments = ("convert", switch_folder, tmp_path / "m.qmoe", "--calibration", text)
    done = qmoe(*arguments, "--samples", "2")
    assert done.code == 1
    assert "m.quality.json: already exists" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["m.quality.json"]


WARNING = "6 of 6 experts saw fewer tokens than their matrices have columns (the fewest: "


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ((), rf"{re.escape(WARNING)}\d+\); calibrate on more text, or use --all-experts"),
        (("--all-experts",), rf"{re.escape(WARNING)}32\); calibrate on more text"),
        (("--all-experts", "--samples", "3"), None),
    ],
)
def test_a_warning_about_experts_with_few_tokens(
    mixtral_folder: Path,
    text: Path,
    tmp_path: Path,
    qmoe: Any,
    options: list[str],
    warning: str | None,
) -> None:
    """It ends what ``convert`` and ``inspect --quality`` print; matrices have up to 80 columns."""
    file = tmp_path / "m.qmoe"
    command = ("convert", mixtral_folder, file, "--calibration", text, "--recipe", "qmoe")
    converted = qmoe(*command, "--sequence-length", "32", "--samples", "1", *options)
    assert (converted.code, converted.err) == (0, "")
    for done in (converted, qmoe("inspect", file, "--quality")):
        if warning:
            assert re.fullmatch(warning, done.out.splitlines()[-1])
        else:
            assert "fewer tokens" not in done.out
