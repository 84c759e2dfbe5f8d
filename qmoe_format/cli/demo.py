"""``qmoe demo``: the whole way on a small model that ships with the package."""

from __future__ import annotations

import tempfile
import textwrap
import time
from importlib import resources
from pathlib import Path
from typing import Any

import qmoe_format
from qmoe_format.cli.models import quiet
from qmoe_format.cli.progress_line import Progress
from qmoe_format.cli.tables import quality_tables, summary, tensor_table
from qmoe_format.cli.text import size
from qmoe_format.container.inspection import describe
from qmoe_format.conversion import Calibration, convert
from qmoe_format.conversion.report import read_report
from qmoe_format.errors import QMoEError

BITS = 1.0  # a weight, scales included; of so narrow experts these alone are 0.2
PROMPTS = ("The LORD is my shepherd;", "And Moses said unto the children of Israel,")


def demo() -> None:
    """Convert, verify and inspect the package's model, and let it write before and after."""
    quiet()
    with resources.as_file(resources.files(qmoe_format) / "demo") as folder:
        _demo(folder)


def _demo(source: Path) -> None:
    if not (source / "config.json").is_file():
        raise QMoEError("not-found", f"{source}: the demo's model is not there; install again")
    target = Path(tempfile.mkdtemp(prefix="qmoe-demo-")) / "demo.qmoe"

    _begin("Convert", f"the model reads some text, its experts become {BITS:g} bit a weight")
    started = time.perf_counter()
    with Progress("convert", "weights") as progress:
        convert(
            source,
            target,
            calibration=Calibration(source / "calibration.jsonl", target_column="target"),
            bits_per_weight=BITS,
            progress=progress,
        )
    before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    _say(
        f"{size(before)} of weights became {target.name}, {size(target.stat().st_size)}, "
        f"in {time.perf_counter() - started:.0f} s"
    )
    with qmoe_format.open(target) as file:
        _begin("Verify", "checksums, every codeword, every byte of padding")
        file.verify()
        _say(f"{target.name} is good")
        _begin("Inspect", "what was compressed; everything else is kept as it was")
        description = describe(file)
        quality = read_report(file)
    _say("\n".join([*tensor_table(description, compressed_only=True), ""]))
    _say("\n".join([*quality_tables(quality), ""]))
    _say("\n".join(summary(description)))

    _begin("Generate", "what the model makes of a prompt, before, and with compressed experts")
    original, compressed = _models(source, target)
    for prompt in PROMPTS:
        _say(f"prompt:     {prompt}")
        _say(f"original:   {_continuation(*original, prompt)}")
        _say(f"compressed: {_continuation(*compressed, prompt)}\n")

    print(f"The file is {target}\nLook into it with: qmoe inspect {target}")


def _begin(name: str, what: str) -> None:
    print(f"\n{name}: {what}\n", flush=True)


def _say(text: str) -> None:
    print(textwrap.indent(text, "  "), flush=True)


def _models(source: Path, target: Path) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Tokenizer and model of both, in float32: bfloat16 is slow on many CPUs."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from qmoe_format.runtime import load_model, load_tokenizer

    # So small a model is fastest on one thread, and very slow on two if other programs are busy.
    torch.set_num_threads(1)
    original = AutoModelForSeq2SeqLM.from_pretrained(
        source, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    compressed = load_model(target, dtype=torch.float32)
    return (tokenizer, original.eval()), (load_tokenizer(target), compressed)


def _continuation(tokenizer: Any, model: Any, prompt: str) -> str:
    output = model.generate(**tokenizer(prompt, return_tensors="pt"))
    return str(tokenizer.decode(output[0], skip_special_tokens=True)).strip()
