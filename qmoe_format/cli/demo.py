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
from qmoe_format.cli.text import size
from qmoe_format.conversion import convert, require
from qmoe_format.errors import QMoEError
from qmoe_format.inspection import describe
from qmoe_format.unpacking import unpack

PROMPTS = ("The LORD is my shepherd;", "And Moses said unto the children of Israel,")


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
    if not (source / "config.json").is_file():
        raise QMoEError("not-found", f"{source}: the demo's model is not there; install again")
    target = Path(tempfile.mkdtemp(prefix="qmoe-demo-")) / "demo.qmoe"

    _begin("Convert", "round the experts' weights to three values a row, and code them")
    started = time.perf_counter()
    convert(source, target)
    before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    _say(
        f"{size(before)} of weights became {target.name}, {size(target.stat().st_size)}, "
        f"in {time.perf_counter() - started:.1f} s"
    )
    with qmoe_format.open(target) as file:
        _begin("Verify", "checksums, every codeword, every byte of padding")
        file.verify()
        _say(f"{target.name} is good")
        _begin("Inspect", "what was compressed; everything else is kept as it was")
        description = describe(file)
    _say("\n".join([*tensor_table(description, compressed_only=True), ""]))
    _say("\n".join(summary(description)))

    _begin("Generate", "what the model makes of a prompt, before and after")
    with tempfile.TemporaryDirectory(prefix="qmoe-demo-") as scratch:
        original = _load(source)
        compressed = _load(unpack(target, Path(scratch) / "unpacked"))
        for prompt in PROMPTS:
            _say(f"prompt:     {prompt}")
            _say(f"original:   {_continuation(*original, prompt)}")
            _say(f"compressed: {_continuation(*compressed, prompt)}\n")

    print(f"The file is {target}\nLook into it with: qmoe inspect {target}")


def _begin(name: str, what: str) -> None:
    print(f"\n{name}: {what}\n", flush=True)


def _say(text: str) -> None:
    print(textwrap.indent(text, "  "), flush=True)


def _load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model, in float32: bfloat16 is slow on many CPUs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    # So small a model is fastest on one thread, and very slow on two if other programs are busy.
    torch.set_num_threads(1)
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
