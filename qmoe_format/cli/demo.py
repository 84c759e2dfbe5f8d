"""``qmoe demo``: the whole way on a small model that ships with the package."""

from __future__ import annotations

import os
import tempfile
import textwrap
import time
from importlib import resources
from pathlib import Path
from typing import Any

import qmoe_format
from qmoe_format.cli.tables import summary, tensor_table
from qmoe_format.conversion import convert, require
from qmoe_format.errors import QMoEError
from qmoe_format.inspection import describe
from qmoe_format.unpacking import unpack

PROMPTS = ("In the beginning God created", "And Moses said unto the children of Israel,")


def demo(source: Path | None = None) -> None:
    """Convert, verify, inspect and unpack ``source``, and let the model write before and after.

    Without ``source`` the model of the package is taken.
    """
    require("torch", "safetensors", "transformers")
    if source is None:
        with resources.as_file(resources.files(qmoe_format) / "demo") as folder:
            _demo(folder)
    else:
        _demo(source)


def _demo(source: Path) -> None:
    started = time.monotonic()
    if not (source / "config.json").is_file():
        raise QMoEError("not-found", f"{source}: the demo's model is not there; install again")
    folder = Path(tempfile.mkdtemp(prefix="qmoe-demo-"))
    target = folder / "demo.qmoe"

    _step("Convert", f"a small Switch Transformer, {_bytes(source):,} bytes")
    convert(source, target)
    print(f"  {target.name}: {target.stat().st_size:,} bytes")

    with qmoe_format.open(target) as file:
        _step("Verify", "checksums, every codeword, every padding byte")
        file.verify()
        print("  good")
        description = describe(file)
    _step("Inspect", "experts take under a bit a weight, the rest is kept exactly")
    print(textwrap.indent("\n".join([*tensor_table(description), "", *summary(description)]), "  "))

    with tempfile.TemporaryDirectory(prefix="qmoe-demo-") as scratch:
        _step("Generate", "greedy or by beams, as the model's own settings say")
        unpacked = unpack(target, Path(scratch) / "unpacked")
        original, compressed = _load(source), _load(unpacked)
        for prompt in PROMPTS:
            print(f"  prompt      {prompt}")
            print(f"  original    {_continuation(*original, prompt)}")
            print(f"  compressed  {_continuation(*compressed, prompt)}\n")

    print(f"The file is {target}")
    print(f"Try: qmoe inspect {target}   ({time.monotonic() - started:.0f} s)")


def _step(name: str, what: str) -> None:
    print(f"\n{name}: {what}", flush=True)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors")


def _load(folder: Path) -> tuple[Any, Any]:
    """A tokenizer and a model, in float32: bfloat16 is slow on many CPUs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    return tokenizer, model.eval()


def _continuation(tokenizer: Any, model: Any, prompt: str) -> str:
    output = model.generate(**tokenizer(prompt, return_tensors="pt"))
    return str(tokenizer.decode(output[0], skip_special_tokens=True)).strip()
