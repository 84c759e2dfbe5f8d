"""What rounding activations to int8 adds to the loss of compressed models.

    python -m benchmarks.rounded_x [--folder FOLDER]

Writes benchmarks/results/rounded_x.json: KL(original ‖ file) of the two trained models, converted
by ``rd`` as by default, on text that they were not calibrated with: once with exact products, once
with x rounded as the runtime does unless it is asked not to. Files in FOLDER are used again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import qmoe_format
from benchmarks import report
from qmoe_format.calibration.sequences import read_batches
from qmoe_format.runtime import load_model, load_tokenizer, place_experts
from qmoe_format.runtime.evaluation import evaluate
from qmoe_format.runtime.loading import load_original

MODELS = ("mixtral-mini", "switch-mini")
SEQUENCES = 96


def measure(name: str, folder: Path) -> dict[str, Any]:
    checkpoint, file = report.DATA / name, folder / f"{name}.qmoe"
    text = report.DATA / "text"
    if not file.exists():
        qmoe_format.convert(checkpoint, file, calibration=text / "calibration.jsonl")
    model = load_model(file, dtype=torch.float32, exact=True)
    original = load_original(checkpoint, torch.float32)
    batches = read_batches(
        load_tokenizer(file), model.config.to_dict(), text / "eval.jsonl", samples=SEQUENCES
    )
    found: dict[str, float] = {}
    for way, exact in (("exact", True), ("rounded", False)):
        place_experts(model, exact=exact)
        evaluation = evaluate(model, batches, against=original)
        assert evaluation.kl
        found |= {"tokens": evaluation.tokens, f"{way}: kl": evaluation.kl.value}
    return {"model": name, **found, "added": found["rounded: kl"] / found["exact: kl"] - 1}


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--folder", type=Path)
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        results = [measure(name, folder or Path(temporary)) for name in MODELS]
    for each in results:
        print(each)
    report.save("rounded_x", {"results": results})


if __name__ == "__main__":
    main()
