"""NVIDIA's run-time compiler from its wheels, called without CuPy: it needs no driver and no GPU.

Kernels compile here with CuPy's options for any architecture; the compiler's log says what
resources each kernel takes.
"""

from __future__ import annotations

import ctypes
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

from qmoe_format.gpu.launch import Kernel

# The compilers of cupy-cuda12x and of cupy-cuda13x.
PACKAGES = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")
ARCHITECTURES = (
    *("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a"),
    *("sm_100", "sm_103", "sm_120"),
)
OPTIONS = ("-ftz=true", "--device-as-default-execution-space", "-std=c++17")  # CuPy's and ours

_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?Function properties for (?P=kernel)\n"
    r"\D*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def architectures(kernel: Kernel) -> tuple[str, ...]:
    """Those that have a kernel's instructions: mma of bf16 came with sm_80."""
    return tuple(a for a in ARCHITECTURES if "mma.sync" not in kernel.source or a != "sm_75")


class CompileError(Exception):
    """A source that does not compile; the message is the compiler's log."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel takes per thread, and in ``shared`` (static shared memory) per block."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


class Compiler:
    """One NVRTC and its ``version``, such as 13.0."""

    def __init__(self, package: str) -> None:
        files = [file for file in metadata.files(package) or () if "alt" not in file.name]
        # The compiler looks for its built-ins by their name alone: load them before it asks.
        for part in ("libnvrtc-builtins.so", "libnvrtc.so"):
            path = next(file.locate() for file in files if file.name.startswith(part))
            self._library = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def compile(self, source: str, architecture: str) -> dict[str, Resources]:
        """Compile ``source`` to machine code: resources by kernel. Raises ``CompileError``."""
        return parse(self.build(source, architecture)[1])

    def build(self, source: str, architecture: str) -> tuple[bytes, str]:
        """Compile ``source`` to machine code: that, and the log. Raises ``CompileError``."""
        nvrtc, program = self._library, ctypes.c_void_p()
        options = [*OPTIONS, "--ptxas-options=-v", f"-arch={architecture}"]
        values = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
        )
        if status != 0:
            raise CompileError(f"nvrtcCreateProgram: {status}")
        status = nvrtc.nvrtcCompileProgram(program, len(values), values)

        def fetch(what: str) -> bytes:
            size = ctypes.c_size_t()
            nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
            buffer = ctypes.create_string_buffer(size.value)
            nvrtc[f"nvrtcGet{what}"](program, buffer)
            return buffer.raw

        log, code = fetch("ProgramLog").rstrip(b"\0").decode(), b"" if status else fetch("CUBIN")
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        if status != 0:
            raise CompileError(log)
        return code, log


def parse(log: str) -> dict[str, Resources]:
    """Resources by kernel, from the log of ``--ptxas-options=-v``."""
    return {
        found["kernel"]: Resources(
            int(found["registers"]),
            int(found["shared"] or 0),
            int(found["stack"]),
            int(found["stores"]),
            int(found["loads"]),
        )
        for found in _KERNEL.finditer(log)
    }


def machine_code(cubin: bytes, kernel: str) -> bytes:
    """A kernel's instructions: the section ``.text.KERNEL`` of an ELF file."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count, last = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<2I4Q", cubin, headers + size * i) for i in range(count)]
    names = sections[last][4]
    for name, _, _, _, begin, length in sections:
        if cubin[names + name :].startswith(f".text.{kernel}\0".encode()):
            return cubin[begin : begin + length]
    raise KeyError(kernel)


@lru_cache(maxsize=1)
def compilers() -> tuple[Compiler, ...]:
    """Those of ``PACKAGES`` that are installed; they are requirements on Linux only."""
    found = []
    for package in PACKAGES:
        try:
            found.append(Compiler(package))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)
