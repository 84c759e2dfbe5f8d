"""Dividing experts among threads."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from qmoe_format.conversion.parallel import BATCH_ELEMENTS, batches


@given(
    number=st.integers(0, 300),
    elements=st.integers(1, 2 * BATCH_ELEMENTS),
    threads=st.integers(1, 9),
)
def test_all_threads_have_as_much_to_do(number: int, elements: int, threads: int) -> None:
    parts = batches(range(number), elements, threads)
    assert [item for part in parts for item in part] == list(range(number))
    sizes = [len(part) for part in parts]
    assert all(size == 1 or size * elements <= BATCH_ELEMENTS for size in sizes)
    longest = max((sum(sizes[thread::threads]) for thread in range(threads)), default=0)
    # A batch more than its share at most: the last one of a thread is cut short.
    assert longest <= -(-number // threads) + len(sizes[::threads])
