"""Numbers below 1.2e-38, which a processor is slow with."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch

from qmoe_format.machine import flushing_thread


def test_one_thread_and_those_of_its_own_take_them_for_zeros() -> None:
    tiny = torch.full((1 << 20,), 1e-39)  # enough for all of torch's threads
    with flushing_thread() as thread:
        flushed = thread.submit(lambda: tiny * 0.5).result()
    assert flushed.count_nonzero() == 0
    assert (tiny * 0.5).count_nonzero() == len(tiny)
