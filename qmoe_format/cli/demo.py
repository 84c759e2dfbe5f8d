"""``qmoe demo``: every step, on a small model that ships with the package."""

from __future__ import annotations

import argparse
import textwrap
import time
from pathlib import Path
from typing import Any

from qmoe_format.cli import models
from qmoe_format.cli.arguments import Commands
from qmoe_format.cli.formatting import size
from qmoe_format.cli.progress_line import ProgressLine
from qmoe_format.cli.tables import quality_tables, summary, tensor_table
from qmoe_format.errors import QMoEError

BITS = 1.0  # per weight, scales included: the experts are so narrow that these alone take 0.2
PROMPTS = ("The LORD is my shepherd;", "And Moses said unto the children of Israel,")


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="try everything on a small model that ships with the package",
        description="Convert, verify and inspect a small Switch Transformer that ships with the "
        "package, and let the original and the compressed model continue a text.",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from importlib import resources

    models.require_transformers()
    with resources.as_file(resources.files("qmoe_format") / "demo") as folder:
        _demo(folder)


def _demo(source: Path) -> None:
    import tempfile

    from qmoe_format import container
    from qmoe_format.container.inspection import describe
    from qmoe_format.conversion import Calibration, convert
    from qmoe_format.conversion.report import read_report

    if not (source / "config.json").is_file():
        raise QMoEError(
            "not-found", f"{source}: the demo model is missing", "reinstall qmoe-format"
        )
    target = Path(tempfile.mkdtemp(prefix="qmoe-demo-")) / "demo.qmoe"

    _begin("Convert", f"read some text, and compress the experts to {BITS:g} bit per weight")
    started = time.perf_counter()
    with ProgressLine("convert", "weights") as progress:
        convert(
            source,
            target,
            calibration=Calibration(source / "calibration.jsonl", target_column="target"),
            bits_per_weight=BITS,
            progress=progress,
        )
    before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    _print(
        f"{size(before)} of weights became {target.name}, {size(target.stat().st_size)}, "
        f"in {time.perf_counter() - started:.0f} s"
    )
    with container.open(target) as file:
        _begin("Verify", "check all checksums, codewords and padding")
        file.verify()
        _print(f"{target.name} is good")
        _begin("Inspect", "the compressed tensors; all others are kept as they were")
        description = describe(file)
        quality = quality_tables(read_report(file), file)
    _print("\n".join([*tensor_table(description, compressed_only=True), ""]))
    _print("\n".join([*quality, ""]))
    _print("\n".join(summary(description)))

    _begin("Generate", "continue prompts, with the original and with the compressed model")
    original, compressed = _load(source, target)
    for prompt in PROMPTS:
        _print(f"prompt:     {prompt}")
        _print(f"original:   {_continuation(*original, prompt)}")
        _print(f"compressed: {_continuation(*compressed, prompt)}\n")

    print(f"The file is {target}\nTo look at it again: qmoe inspect {target}")


def _begin(step: str, text: str) -> None:
    print(f"\n{step}: {text}\n", flush=True)


def _print(text: str) -> None:
    print(textwrap.indent(text, "  "), flush=True)


def _load(source: Path, target: Path) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Tokenizer and model of both, in float32: bfloat16 is slow on many CPUs."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from qmoe_format.checkpoints import tokenizers
    from qmoe_format.runtime import load_model, load_tokenizer

    # So small a model is fastest on one thread, and very slow on two if other programs are busy.
    torch.set_num_threads(1)
    original = AutoModelForSeq2SeqLM.from_pretrained(
        source, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    tokenizer = tokenizers.load_tokenizer(source)
    compressed = load_model(target, dtype=torch.float32)
    return (tokenizer, original.eval()), (load_tokenizer(target), compressed)


def _continuation(tokenizer: Any, model: Any, prompt: str) -> str:
    output = model.generate(**tokenizer(prompt, return_tensors="pt"))
    return str(tokenizer.decode(output[0], skip_special_tokens=True)).strip()
