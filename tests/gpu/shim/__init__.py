"""Run kernels on the CPU: the same text that a GPU gets, with every memory access checked.

``execute(launch)`` compiles the source with g++ (once; the library is kept under ``build/``) and
runs it on numpy arrays. ``Fault`` says what a kernel did wrong; ``runtime.cpp`` lists the checks.
Unlike a GPU, this does not run blocks in parallel, reorder memory accesses, contract a * b + c or
run out of registers.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qmoe_format.gpu.launch import Launch

HERE = Path(__file__).parent
BUILD = HERE.parents[2] / "build" / "shim"
RUNTIME_FLAGS = ["-O2", "-U_FORTIFY_SOURCE"]
KERNEL_FLAGS = [
    *("-Og", "-g1", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-exceptions"),
    *("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"),
    "-fsanitize=alignment,shift,bounds,integer-divide-by-zero",
    *("-fno-sanitize-recover=all", "-fsanitize-coverage=trace-pc"),
]
UNUSED_S = 7 * 24 * 3600  # an unused library is deleted after this time
FORWARD, BACKWARD = 0, 1  # orders of blocks and threads; other numbers are random seeds
MOST_THREADS, MOST_SHARED = 1024, 227 << 10

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Fault(AssertionError):
    """Something that a kernel must not do."""


def execute(launch: Launch, order: int = FORWARD) -> None:
    """Run ``launch``; its arguments are numpy arrays, changed in place, None, and numpy scalars.

    Raises:
        Fault: after which the arrays hold what the kernel had written so far.
    """
    name, threads, shared = launch.kernel.name, launch.kernel.threads, launch.kernel.shared_bytes
    if min(launch.grid) < 1 or not 1 <= threads <= MOST_THREADS:
        raise Fault(f"{name}: no GPU runs {launch.grid} blocks of {threads} threads")
    if not 0 <= shared <= MOST_SHARED:
        raise Fault(f"{name}: no GPU has {shared} bytes of shared memory")
    compiled = _compiled_kernel(launch.kernel.source, name)
    arrays, pointers, _scalars = _arguments(compiled, launch.arguments)
    begin, end = ctypes.c_void_p(), ctypes.c_void_p()
    compiled.library.shim_static_shared(ctypes.byref(begin), ctypes.byref(end))
    runtime = _runtime()
    with _one_at_a_time:
        fault = runtime.shim_launch(
            compiled.library[f"shim_call_{name}"],
            pointers,
            arrays,
            len(arrays),
            (ctypes.c_uint * 3)(*launch.grid),
            (ctypes.c_uint * 3)(threads, 1, 1),
            shared,
            begin,
            end,
            order,
        )
    if fault:
        raise Fault(f"{name}: {_with_lines(fault.decode())}")


_one_at_a_time = threading.Lock()  # threads are for compiling


# -- Compiling -------------------------------------------------------------------------------------

# Name and parameters of a kernel.
_HEAD = re.compile(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(([^)]*)")


@dataclass(frozen=True, slots=True)
class _Parameter:
    name: str
    kind: str  # f, i, u like numpy's, or c: a class of the kernel's own
    size: int
    pointer: bool
    const: bool


@dataclass(frozen=True, slots=True)
class _Kernel:
    library: ctypes.CDLL
    parameters: tuple[_Parameter, ...]


def _compiled(source: str, flags: list[str], link: list[str]) -> Path:
    """A shared library of ``source``, built unless there is one of the same text and flags."""
    texts = [source, *flags, *link, *(path.read_text() for path in sorted(HERE.glob("*.h")))]
    name = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]
    library = BUILD / f"{name}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            here = Path(folder)
            (here / "source.cpp").write_text(source)
            common = ["g++", "-std=c++17", "-fPIC", f"-I{HERE}"]
            # In two steps: when it links, -fsanitize=thread would add libtsan.
            for command in (
                [*common, *flags, "-c", str(here / "source.cpp"), "-o", str(here / "object.o")],
                [*common, "-shared", str(here / "object.o"), *link, "-o", str(here / "new.so")],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise Fault(f"g++ says:\n{done.stderr}")
            (here / "new.so").replace(library)
    library.touch()
    return library


def _runtime() -> Any:
    with _one_at_a_time:
        return _load_runtime()


@cache
def _load_runtime() -> Any:
    for old in BUILD.glob("*.so"):
        if time.time() - old.stat().st_mtime > UNUSED_S:
            old.unlink(missing_ok=True)
    source = (HERE / "runtime.cpp").read_text()
    library = ctypes.CDLL(str(_compiled(source, RUNTIME_FLAGS, ["-ldl"])), ctypes.RTLD_GLOBAL)
    library.shim_launch.restype = ctypes.c_char_p
    return library


@cache
def _library(source: str) -> ctypes.CDLL:
    # Dynamic shared memory is the only declaration that macros cannot translate.
    text = re.sub(
        r"extern\s+__shared__\s+([\w ]+?)\s+(\w+)\[\];", r"\1* const \2 = (\1*)shim_shared;", source
    )
    kernels = [match[1] for match in _HEAD.finditer(text)]
    exports = "".join(f"SHIM_KERNEL({name})\n" for name in kernels)
    text = f'#include "cuda.h"\n#line 1 "source"\n{text}\n{exports}'
    runtime = _runtime()._name
    return ctypes.CDLL(str(_compiled(text, KERNEL_FLAGS, [runtime])))


@cache
def _compiled_kernel(source: str, name: str) -> _Kernel:
    library = _library(source)
    codes = (ctypes.c_uint * 64)()
    count = library[f"shim_signature_{name}"](codes)
    heads = {match[1]: match[2] for match in _HEAD.finditer(re.sub(r"//.*", "", source))}
    names = re.findall(r"(\w+)\s*(?:,|$)", heads[name])
    parameters = tuple(
        _Parameter(name, chr(code >> 8 & 255), code & 255, bool(code >> 16 & 1), bool(code >> 17))
        for name, code in zip(names, codes[:count], strict=True)
    )
    return _Kernel(library, parameters)


# -- Arguments -------------------------------------------------------------------------------------


class _Array(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("host", ctypes.c_void_p),
        ("device", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("element", ctypes.c_uint),
        ("writable", ctypes.c_int),
    )


def _arguments(kernel: _Kernel, arguments: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Descriptions of the arrays, the address of each argument, and the scalars themselves."""
    if len(arguments) != len(kernel.parameters):
        raise Fault(f"{len(arguments)} arguments for {len(kernel.parameters)} parameters")
    by_address: dict[tuple[int, int], tuple[np.ndarray, _Parameter, bool]] = {}
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        _check_type(parameter, argument)
        if argument is not None and parameter.pointer:
            key = (argument.ctypes.data, argument.nbytes)
            writable = not parameter.const or (key in by_address and by_address[key][2])
            by_address[key] = (argument, parameter, writable)
    taken = sorted((begin, begin + size, by[2]) for (begin, size), by in by_address.items())
    for (_, end, first), (begin, _, second) in pairwise(taken):
        if begin < end and (first or second):
            raise Fault("an array that is written overlaps another one")
    arrays = (_Array * max(len(by_address), 1))()
    for array, (data, parameter, writable) in zip(arrays, by_address.values(), strict=False):
        array.name, array.host, array.size = parameter.name.encode(), data.ctypes.data, data.nbytes
        array.element, array.writable = data.itemsize, writable
    place = {key: ctypes.addressof(arrays[i]) for i, key in enumerate(by_address)}
    scalars = [np.array(0 if a is None else a) for a in arguments if not isinstance(a, np.ndarray)]
    rest = iter(scalars)
    pointers = (ctypes.c_void_p * max(len(arguments), 1))()
    for i, argument in enumerate(arguments):
        if isinstance(argument, np.ndarray):
            key = (argument.ctypes.data, argument.nbytes)
            pointers[i] = place[key] + _Array.device.offset
        else:
            pointers[i] = next(rest).ctypes.data
    return arrays, pointers, scalars


def _check_type(parameter: _Parameter, argument: Any) -> None:
    if argument is None and parameter.pointer:
        return
    is_array = isinstance(argument, np.ndarray)
    fits = parameter.kind == "c" and parameter.size % argument.itemsize == 0
    fits |= (parameter.kind, parameter.size) == (argument.dtype.kind, argument.itemsize)
    if is_array != parameter.pointer or not fits:
        raise Fault(f"the argument for {parameter} is {argument.dtype} {argument.shape}")
    if is_array and not argument.flags.c_contiguous:
        raise Fault(f"the array for {parameter.name} is not contiguous")


def _with_lines(text: str) -> str:
    """Replace addresses of instructions by lines of the source."""

    def line(match: re.Match[str]) -> str:
        command = ["addr2line", "-e", match[1], match[2]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return Path(done.stdout.split(" ")[0].strip() or "?").name

    return re.sub(r"@\{(.*?)\+(0x[0-9a-f]+)\}", line, text)
