"""Fixtures for the public calls of ``qmoe_format.gpu``."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from qmoe_format.gpu import cuda
from tests.gpu.fake_cupy import FakeCupy

CACHES = (cuda.module, cuda.device, cuda._kernel)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCupy]:
    """CuPy's place, taken."""
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    for cache in CACHES:
        cache.cache_clear()
    yield fake
    for cache in CACHES:
        cache.cache_clear()
