"""A fixture for the public calls of ``qmoe_format.gpu``: a CuPy that runs on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from qmoe_format.gpu import cuda, launch
from tests.gpu.fake_cupy import FakeCupy

CACHES = (cuda.module, cuda.limits, launch._compiled)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCupy]:
    """A fake in CuPy's place."""
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    for cache in CACHES:
        cache.cache_clear()
    yield fake
    for cache in CACHES:
        cache.cache_clear()
