"""A folder that transformers loads, with experts that stay compressed.

    config.json              the model's, and what says that this is such a folder
    model.dense.safetensors  every tensor that is not a stack
    experts.qmoe             the stacks, and the model's own config.json
    …                        what else was attached, such as a tokenizer

Loading it needs ``import qmoe_format.runtime``. Without, transformers only warns of a quantization
that it does not know, and goes on with random experts wherever it finds weights. Here it finds
none: they do not have the name it looks for, and where config.json may give another there stands
what to do, with which loading ends at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmoe_format.container.encodings import TERNARY_DICT
from qmoe_format.container.writer import Writer
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from qmoe_format.container import QMoEFile, ShardedFile

CONFIG = "config.json"
DENSE = "model.dense.safetensors"
EXPERTS = "experts.qmoe"
METHOD = "qmoe"
_IMPORT_FIRST = "for its compressed experts, import qmoe_format.runtime before this model is loaded"


def read_config(file: QMoEFile | ShardedFile) -> dict[str, Any]:
    """The attached ``config.json``.

    Raises ``QMoEError``: ``not-found``, ``checkpoint``; the codes of reading.
    """
    if CONFIG not in file.attachments:
        raise QMoEError(
            "not-found",
            f"{file.path}: has no {CONFIG} attached, so nobody knows which model it is; convert "
            "the whole folder of the checkpoint",
        )
    text = file.attachment(CONFIG)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QMoEError("checkpoint", f"{file.path}: {CONFIG} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise QMoEError("checkpoint", f"{file.path}: {CONFIG} is not a JSON object")
    return config


def marked(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's ``config.json`` as it is to be in such a folder."""
    return {
        **config,
        "quantization_config": {"quant_method": METHOD, "file": EXPERTS},
        "transformers_weights": _IMPORT_FIRST,
    }


def write_experts(
    file: QMoEFile | ShardedFile, path: Path, written: Callable[[int], None] = lambda size: None
) -> None:
    """Copy the stacks of ``file`` as they are stored, and its ``config.json``, into a new file.

    ``written`` is called after each expert with the bytes it took in ``file``, about.

    Raises ``QMoEError``: the codes of reading and of ``Writer``.
    """
    with Writer(path) as writer:
        if CONFIG in file.attachments:
            writer.add_attachment(CONFIG, file.attachment(CONFIG))
        for name, entry in file.tensors.items():
            if not entry.stack:
                continue
            with writer.add_stack(
                name, entry.shape, entry.dtype, entry.encoding, entry.members, **entry.parameters
            ) as stack:
                done = 0
                for expert in range(entry.shape[0]):
                    if entry.encoding == TERNARY_DICT.name:
                        stack.append(file.encoded(name, expert))
                    else:
                        stack.append(file.read_expert(name, expert))
                    share = entry.stored_bytes * (expert + 1) // entry.shape[0] - done
                    done += share
                    written(share)
