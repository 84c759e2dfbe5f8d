"""The CUDA text of a kernel: generated defines, then files of ``kernels/``."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.resources import files

# What a kernel needs, in the order in which it is put together.
FILES = {
    "product": ("types.cu", "entry.cu", "walk.cu", "product.cu"),
    "decode": ("types.cu", "entry.cu", "walk.cu", "decode.cu"),
    "prepare": ("types.cu", "prepare.cu"),
    "group": ("types.cu", "group.cu"),
    "combine": ("types.cu", "combine.cu"),
}


@cache
def _text(name: str) -> str:
    text = files("qmoe_format.gpu").joinpath("kernels", name).read_text("utf-8")
    return f'#line 1 "{name}"\n{text}'


@lru_cache(maxsize=256)
def source(kernel: str, defines: tuple[tuple[str, str | int], ...]) -> str:
    """The text of ``kernel`` under these defines."""
    head = "".join(f"#define {name} {value}\n" for name, value in defines)
    return head + "".join(map(_text, FILES[kernel]))
