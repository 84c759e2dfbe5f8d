"""Dividing experts among threads."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from qmoe_format.conversion.parallel import BATCH_ELEMENTS, batches, threads_within


@given(
    number=st.integers(0, 300),
    rows=st.integers(1, 400).map(lambda lines: 4 * lines),
    columns=st.integers(1, 1200).map(lambda lines: 4 * lines),
    threads=st.integers(1, 9),
)
def test_all_threads_have_as_much_to_do(number: int, rows: int, columns: int, threads: int) -> None:
    parts = batches(range(number), rows, columns, threads)
    assert [item for part in parts for item in part] == list(range(number))
    sizes = [len(part) for part in parts]
    assert all(size == 1 or size * (rows + columns) * columns <= BATCH_ELEMENTS for size in sizes)
    longest = max((sum(sizes[thread::threads]) for thread in range(threads)), default=0)
    # A batch more than its share at most: the last one of a thread is cut short.
    assert longest <= -(-number // threads) + len(sizes[::threads])


@given(rows=st.integers(1, 400), columns=st.integers(1, 400))
def test_all_matrices_of_a_batch_begin_with_a_cache_line(rows: int, columns: int) -> None:
    for part in batches(range(9), rows, columns, 2):
        for size in (rows * columns, columns * columns):
            assert all(4 * size * place % 64 == 0 for place in range(len(part)))


@pytest.mark.parametrize(("rows", "columns"), [(2080, 6144), (2048, 7168), (14336, 4096)])
def test_a_large_expert_keeps_all_threads_busy(rows: int, columns: int) -> None:
    """Its group has one expert only."""
    assert threads_within(rows * columns + columns**2, 16) == 16


def test_a_gpu_gets_more_at_once() -> None:
    for part in (batches(range(64), 2048, 7168, 1), batches(range(64), 2048, 7168, 1, "cuda")):
        assert [item for each in part for item in each] == list(range(64))
    assert len(batches(range(64), 2048, 7168, 1)) == 64
    assert len(batches(range(64), 2048, 7168, 1, "cuda")) <= 16
