"""Compressed mixture-of-experts weights in one open, checked file.

    import qmoe_format

    with qmoe_format.open("model.qmoe") as file:
        file.tensors                                # name -> TensorEntry
        file.read("shared.weight")                  # a tensor
        file.read_expert("...experts.wi", 7)        # one expert of a stack, and no other
        file.encoded("...experts.wi", 7)            # its codewords and scales as stored
        file.verify()

    with qmoe_format.Writer("model.qmoe") as writer:
        writer.add_tensor("shared.weight", array, "F32")

    qmoe_format.convert("checkpoint", "model.qmoe")     # from a Hugging Face folder, with torch
    qmoe_format.unpack("model.qmoe", "folder")          # and back

    model = qmoe_format.load_model("model.qmoe")        # a model of transformers, to be run
    tokenizer = qmoe_format.load_tokenizer("model.qmoe")

The format is described in SPEC.md. Errors are ``QMoEError`` with a stable ``code``. Everything
below is loaded when it is first used; torch, Numba and CuPy only by what needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qmoe_format._version import __version__

if TYPE_CHECKING:
    from qmoe_format.codec import Dictionary, EncodedMatrix, EncodedTrits
    from qmoe_format.container.entries import AttachmentEntry, DictionaryEntry, TensorEntry
    from qmoe_format.container.reader import QMoEFile, open
    from qmoe_format.container.writer import StackWriter, Writer
    from qmoe_format.conversion import convert
    from qmoe_format.errors import QMoEError
    from qmoe_format.export import unpack
    from qmoe_format.runtime import load_model, load_tokenizer

__all__ = [
    "AttachmentEntry",
    "Dictionary",
    "DictionaryEntry",
    "EncodedMatrix",
    "EncodedTrits",
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
    "AttachmentEntry": "container.entries",
    "Dictionary": "codec",
    "DictionaryEntry": "container.entries",
    "EncodedMatrix": "codec",
    "EncodedTrits": "codec",
    "QMoEError": "errors",
    "QMoEFile": "container.reader",
    "StackWriter": "container.writer",
    "TensorEntry": "container.entries",
    "Writer": "container.writer",
    "convert": "conversion",
    "load_model": "runtime",
    "load_tokenizer": "runtime",
    "open": "container.reader",
    "unpack": "export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
