"""The CUDA text of the kernels, from ``kernels/*.cu`` of this room or of another one."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.resources import files


@lru_cache(maxsize=256)
def source(*names: str, **defines: str | int) -> str:
    """The defines, then the files ``names``: ``NAME`` of this room, or ``ROOM/NAME``."""
    lines = "".join(f"#define {name} {value}\n" for name, value in defines.items())
    return lines + "".join(map(_text, names))


@cache
def _text(name: str) -> str:
    room, _, file = name.rpartition("/")
    folder = files(f"qmoe_format.{room or 'gpu'}") / "kernels"
    return f'#line 1 "{file}.cu"\n' + (folder / f"{file}.cu").read_text("utf-8")
