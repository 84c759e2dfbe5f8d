"""Dividing experts among threads."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from qmoe_format.conversion.parallel import Resources


@given(
    experts=st.integers(0, 300),
    rows=st.integers(1, 400).map(lambda lines: 4 * lines),
    columns=st.integers(1, 1200).map(lambda lines: 4 * lines),
    threads=st.integers(1, 9),
)
def test_threads_get_equal_shares(experts: int, rows: int, columns: int, threads: int) -> None:
    resources = Resources(threads)
    parts = resources.batches(experts, rows, columns)
    assert [item for part in parts for item in part] == list(range(experts))
    sizes = [len(part) for part in parts]
    elements = (rows + columns) * columns
    assert all(size == 1 or size * elements <= resources.batch_elements for size in sizes)
    longest = max((sum(sizes[thread::threads]) for thread in range(threads)), default=0)
    # A batch more than its share at most: the last one of a thread is cut short.
    assert longest <= -(-experts // threads) + len(sizes[::threads])


@given(rows=st.integers(1, 400), columns=st.integers(1, 400))
def test_all_matrices_of_a_batch_begin_at_a_cache_line(rows: int, columns: int) -> None:
    for part in Resources(2).batches(9, rows, columns):
        for size in (rows * columns, columns * columns):
            assert all(4 * size * place % 64 == 0 for place in range(len(part)))


@pytest.mark.parametrize(("rows", "columns"), [(2080, 6144), (2048, 7168), (14336, 4096)])
def test_a_large_expert_keeps_all_threads_busy(rows: int, columns: int) -> None:
    resources = Resources(16)
    assert resources.threads_per_expert(rows * columns + columns**2) == 16
    assert resources.concurrent_experts(rows * columns + columns**2) == 1


def test_a_gpu_gets_more_at_once() -> None:
    cpu, gpu = (Resources(1, device).batches(64, 2048, 7168) for device in ("cpu", "cuda"))
    assert [item for each in gpu for item in each] == list(range(64))
    assert len(cpu) == 64
    assert len(gpu) <= 16


def test_a_batch_fits_into_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra 'convert'")
    resources = Resources(1, "cuda")
    usual = len(resources.batches(64, 2048, 7168)[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gigabytes, most in ((80, usual), (8, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, size=gigabytes << 30: (0, size))
        assert len(resources.batches(64, 2048, 7168)[0]) == most
