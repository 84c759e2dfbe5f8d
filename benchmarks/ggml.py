"""ggml, llama.cpp's library of tensors, as it comes with llama-cpp-python.

Needs the extra ``gguf``, both of its packages: of llama-cpp-python the shared libraries, and what
writes files or reads types back uses gguf-py. Types have ggml's names, such as ``IQ1_S``. With
``GGML_LIBRARIES`` the shared libraries are those of that folder.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qmoe_format.errors import QMoEError

PACKAGE = "llama-cpp-python"

_POINTER = ctypes.c_void_p
_INT, _INT64, _SIZE = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_ROWS = 64  # that are quantized: speed does not depend on values, and some types take long
_TYPES = 40  # at least, in all versions
_ROOM = 1 << 20  # bytes for a graph


def available() -> bool:
    """Whether both packages are installed."""
    return all(find_spec(name) for name in ("llama_cpp", "gguf"))


def version() -> str | None:
    """Of llama-cpp-python, if both packages are installed."""
    return importlib.metadata.version(PACKAGE) if available() else None


@cache
def library(name: str) -> ctypes.CDLL:
    """A shared library of llama-cpp-python: ``ggml-base`` or ``ggml-cpu``.

    Raises:
        QMoEError: ``dependency`` if a package is missing.
    """
    package = find_spec("llama_cpp")
    if not available() or package is None or package.origin is None:
        advice = "run: pip install 'qmoe-format[gguf]'"
        raise QMoEError("dependency", "llama_cpp or gguf cannot be imported", advice)
    files = {"win32": f"{name}.dll", "darwin": f"lib{name}.dylib"}
    file = files.get(sys.platform, f"lib{name}.so")
    folder = os.environ.get("GGML_LIBRARIES", Path(package.origin).parent / "lib")
    return ctypes.CDLL(str(Path(folder) / file), mode=ctypes.RTLD_GLOBAL)


def _function(name: str, result: Any, *arguments: Any, of: str = "ggml-base") -> Any:
    function = library(of)[name]
    function.restype, function.argtypes = result, list(arguments)
    return function


@cache
def size(name: str) -> tuple[int, int, int]:
    """A type's number, the weights in a block of it, and the bytes of that."""
    name_of = _function("ggml_type_name", ctypes.c_char_p, _INT)
    weights = _function("ggml_blck_size", _INT64, _INT)
    bytes_of = _function("ggml_type_size", _SIZE, _INT)
    (number,) = (i for i in range(_TYPES) if (name_of(i) or b"").decode().upper() == name)
    return number, weights(number), bytes_of(number)


def quantize(name: str, weights: NDArray[Any], importance: NDArray[Any]) -> NDArray[np.uint8]:
    """A matrix in a type.

    Args:
        weights: float32 [rows, columns], of whole blocks.
        importance: of the columns, float32 [columns].

    Returns:
        uint8 [rows, bytes of a row].
    """
    number, block, bytes_of_block = size(name)
    rows, columns = weights.shape
    stored = np.empty((rows, columns // block * bytes_of_block), np.uint8)
    _function("ggml_quantize_init", None, _INT)(number)
    call = _function(
        "ggml_quantize_chunk", _SIZE, _INT, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER
    )
    weights, importance = map(np.ascontiguousarray, (weights, importance))
    arrays = weights.ctypes.data, stored.ctypes.data
    written = call(number, *arrays, 0, rows, columns, importance.ctypes.data)
    assert written == stored.nbytes
    return stored


class _Parameters(ctypes.Structure):
    _fields_ = (("bytes", _SIZE), ("buffer", _POINTER), ("no_alloc", ctypes.c_bool))


class Product:
    """``ggml_mul_mat`` of a random matrix in a type with random x, which ggml rounds itself."""

    def __init__(self, name: str, rows: int, columns: int, tokens: int) -> None:
        rng = np.random.default_rng(0)
        some = rng.standard_normal((_ROWS, columns), np.float32)
        stored = np.resize(
            quantize(name, some, np.ones(columns, np.float32)),
            (rows, columns // size(name)[1] * size(name)[2]),
        )
        x = rng.standard_normal((tokens, columns), np.float32)
        room = stored.nbytes + x.nbytes + 4 * tokens * rows + _ROOM
        tensor = _function("ggml_new_tensor_2d", _POINTER, _POINTER, _INT, _INT64, _INT64)
        data = _function("ggml_get_data", _POINTER, _POINTER)
        multiply = _function("ggml_mul_mat", _POINTER, _POINTER, _POINTER, _POINTER)
        self._backend = _function("ggml_backend_cpu_init", _POINTER, of="ggml-cpu")()
        start = _function("ggml_init", _POINTER, _Parameters)
        self._context = start(_Parameters(room, None, False))
        weights = tensor(self._context, size(name)[0], columns, rows)
        activations = tensor(self._context, size("F32")[0], columns, tokens)
        ctypes.memmove(data(weights), stored.ctypes.data, stored.nbytes)
        ctypes.memmove(data(activations), x.ctypes.data, x.nbytes)
        result = multiply(self._context, weights, activations)
        self._graph = _function("ggml_new_graph", _POINTER, _POINTER)(self._context)
        _function("ggml_build_forward_expand", None, _POINTER, _POINTER)(self._graph, result)
        self._compute = _function("ggml_backend_graph_compute", _INT, _POINTER, _POINTER)
        self._set_threads = _function(
            "ggml_backend_cpu_set_n_threads", None, _POINTER, _INT, of="ggml-cpu"
        )

    def run(self, threads: int) -> None:
        """Multiply once."""
        self._set_threads(self._backend, threads)
        self._compute(self._backend, self._graph)

    def close(self) -> None:
        """Free everything."""
        _function("ggml_free", None, _POINTER)(self._context)
        _function("ggml_backend_free", None, _POINTER)(self._backend)


@contextmanager
def products(names: tuple[str, ...], *shape: int) -> Iterator[dict[str, Product]]:
    """A product of each type for which ``shape``, rows, columns and tokens, has whole blocks."""
    made = {name: Product(name, *shape) for name in names if shape[1] % size(name)[1] == 0}
    try:
        yield made
    finally:
        for each in made.values():
            each.close()
