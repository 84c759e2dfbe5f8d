"""Compressed mixture-of-experts weights in an open, checked file format.

    import qmoe_format

    with qmoe_format.open("model.qmoe") as file:
        file.tensors                                # name -> TensorEntry
        file.read("shared.weight")                  # a tensor
        file.read_expert("...experts.wi", 7)        # one expert of a stack, and nothing else
        file.encoded("...experts.wi", 7)            # its codewords and scales, as stored
        file.verify()

    with qmoe_format.Writer("model.qmoe") as writer:
        writer.add_tensor("shared.weight", array, "F32")

    qmoe_format.convert("checkpoint", "model.qmoe")     # from a Hugging Face folder, with torch
    qmoe_format.unpack("model.qmoe", "folder")          # and back

    model = qmoe_format.load_model("model.qmoe")        # a model of transformers, ready to run
    tokenizer = qmoe_format.load_tokenizer("model.qmoe")

SPEC.md specifies the format. Errors are ``QMoEError`` with a stable ``code``. Every name below is
loaded when it is first used, so that nothing imports torch, Numba or CuPy before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qmoe_format._version import __version__

if TYPE_CHECKING:
    from qmoe_format.codec import Dictionary, EncodedLevels, EncodedMatrix
    from qmoe_format.container import QMoEFile, StackWriter, Writer, open
    from qmoe_format.container.entries import AttachmentEntry, DictionaryEntry, TensorEntry
    from qmoe_format.conversion import convert
    from qmoe_format.errors import QMoEError
    from qmoe_format.export import unpack
    from qmoe_format.runtime import load_model, load_tokenizer

__all__ = [
    "AttachmentEntry",
    "Dictionary",
    "DictionaryEntry",
    "EncodedLevels",
    "EncodedMatrix",
    "QMoEError",
    "QMoEFile",
    "StackWriter",
    "TensorEntry",
    "Writer",
    "__version__",
    "convert",
    "load_model",
    "load_tokenizer",
    "open",
    "unpack",
]

_HOMES = {
    "codec": ("Dictionary", "EncodedMatrix", "EncodedLevels"),
    "container": ("QMoEFile", "StackWriter", "Writer", "open"),
    "container.entries": ("AttachmentEntry", "DictionaryEntry", "TensorEntry"),
    "conversion": ("convert",),
    "errors": ("QMoEError",),
    "export": ("unpack",),
    "runtime": ("load_model", "load_tokenizer"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
