"""A folder that transformers loads, with experts that stay compressed.

    config.json              the model's, with entries that say what the folder is
    model.dense.safetensors  every tensor that is not an expert stack
    experts.qmoe             the expert stacks, and the model's original config.json
    …                        the other attachments, such as a tokenizer

Loading it needs ``import qmoe_format.runtime``. Without it, transformers only warns of an unknown
quantization method, and initializes experts at random wherever it finds the other weights. So it
must not find them: they do not have the default name, and the entry of config.json that can name
another file holds advice instead, which ends up in the error message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmoe_format.container import QMoEFile, Writer
from qmoe_format.errors import QMoEError
from qmoe_format.progress import Counter

CONFIG_FILE = "config.json"
DENSE_FILE = "model.dense.safetensors"
EXPERTS_FILE = "experts.qmoe"
QUANT_METHOD = "qmoe"
_IMPORT_FIRST = "for its compressed experts, import qmoe_format.runtime before this model is loaded"


def read_config(file: QMoEFile) -> dict[str, Any]:
    """Parse the attached ``config.json``.

    Raises:
        QMoEError: ``not-found`` without one; ``checkpoint`` if it is not JSON; the codes of
            reading.
    """
    if CONFIG_FILE not in file.attachments:
        raise QMoEError(
            "not-found",
            f"{file.path}: {CONFIG_FILE} is not attached, so the kind of model is unknown",
            "convert the whole folder of the checkpoint",
        )
    text, problem = file.attachment(CONFIG_FILE), "is not a JSON object"
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        config, problem = None, f"is not JSON ({error})"
    if not isinstance(config, dict):
        raise QMoEError(
            "checkpoint",
            f"{file.path}: {CONFIG_FILE} {problem}",
            "convert the checkpoint again, with its original config.json",
        )
    return config


def read_float_config(file: QMoEFile) -> dict[str, Any]:
    """Likewise, of a file whose weights are experts or floats: such a folder has no others.

    Raises:
        QMoEError: ``argument`` for a file with other weights; and as ``read_config``.
    """
    config = read_config(file)
    if b'"quantization_config"' in file.attachment(CONFIG_FILE):
        raise QMoEError(
            "argument",
            f"{file.path}: weights other than those of experts are quantized, which a folder with "
            "compressed experts cannot hold",
            "unpack the file without --compressed, or convert the model without --keep-native",
        )
    return config


def marked_config(config: Mapping[str, Any]) -> bytes:
    """The text of ``config.json`` in such a folder, from the model's."""
    marks = {
        "quantization_config": {"quant_method": QUANT_METHOD, "file": EXPERTS_FILE},
        "transformers_weights": _IMPORT_FIRST,
    }
    return json.dumps({**config, **marks}, indent=2).encode() + b"\n"


def write_experts(file: QMoEFile, path: Path, counter: Counter) -> None:
    """Copy the stacks of ``file`` as they are stored, and its ``config.json``, to a new file.

    Raises:
        QMoEError: the codes of reading and of ``Writer``.
    """
    with Writer(path) as writer:
        if CONFIG_FILE in file.attachments:
            writer.add_attachment(CONFIG_FILE, file.attachment(CONFIG_FILE))
        for name, entry in file.tensors.items():
            if not entry.stack:
                continue
            with writer.add_stack(
                name, entry.shape, entry.dtype, entry.encoding, entry.members,
                transposed=entry.transposed, **entry.parameters,
            ) as stack:  # fmt: skip
                counted = 0
                for expert in range(entry.shape[0]):
                    stack.append(file.encoded(name, expert))
                    share = entry.stored_bytes * (expert + 1) // entry.shape[0] - counted
                    counted += share
                    counter.add(share)
