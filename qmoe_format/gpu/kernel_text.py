"""The CUDA text of the kernels, from ``kernels/*.cu``."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.resources import files


@lru_cache(maxsize=256)
def source(*names: str, **defines: str | int) -> str:
    """The defines, then the files ``names``."""
    lines = "".join(f"#define {name} {value}\n" for name, value in defines.items())
    return lines + "".join(map(_text, names))


@cache
def _text(name: str) -> str:
    text = files("qmoe_format.gpu").joinpath("kernels", f"{name}.cu").read_text("utf-8")
    return f'#line 1 "{name}.cu"\n{text}'
