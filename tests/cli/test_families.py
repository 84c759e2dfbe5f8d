"""``qmoe families`` and the text about families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra 'convert'")

import qmoe_format
from qmoe_format.checkpoints.registry import UNCALIBRATED, UNSUPPORTED, supported_types
from qmoe_format.cli import main

FAMILIES = Path(qmoe_format.__file__).parent / "checkpoints" / "FAMILIES.md"


def test_the_text_has_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families"]) == 0
    assert FAMILIES.read_text("utf-8").split("```\n")[1] == capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    types = {each["type"]: each for each in report["types"]}
    assert tuple(types) == supported_types()
    assert {name for name, each in types.items() if not each["calibration"]} == set(UNCALIBRATED)
    assert types["zaya"]["reason"] == UNCALIBRATED["zaya"]
    assert {each["type"]: each["reason"] for each in report["unsupported"]} == UNSUPPORTED
    assert not types.keys() & UNSUPPORTED.keys()
