"""Runs of gap codes from codewords that are already in a GPU's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from qmoe_format.gpu import cuda, launch_plan, runs
from qmoe_format.gpu.arrays import Library
from qmoe_format.gpu.launch import execute
from qmoe_format.gpu.launch_plan import Workspace
from qmoe_format.gpu.packing import PackedStack
from qmoe_format.gpu.runs import PackedRuns, RunLayout

# Bytes of decoded levels, at most 1/16 of what is free, unless one matrix takes more. If all fit,
# they are decoded once, otherwise twice.
SCRATCH = 1 << 30


def runs_of(stack: PackedStack, layout: RunLayout, device: int) -> PackedRuns:
    """Transcode a stack on GPU ``device``, some matrices at a time; waits until it is done.

    Raises:
        QMoEError: ``memory``; ``dependency`` if CuPy cannot compile.
    """
    cupy, limits = cuda.module(), cuda.limits(device)
    stream = cupy.cuda.get_current_stream()
    experts, rows, columns = layout.experts, layout.rows, layout.columns
    with cuda.out_of_memory():
        scratch = min(SCRATCH, cupy.cuda.Device(device).mem_info[0] // 16)
        batch = max(1, min(experts, scratch // (2 * rows * columns)))
        levels = cupy.empty((batch, rows, columns), np.float16)
        sizes = cupy.empty((experts, rows, 2), np.uint32)
        highest = cupy.zeros((1,), np.int32)
        arrays = {
            "offsets": cupy.empty((experts, layout.groups + 1), np.uint32),
            "starts": cupy.empty((experts, layout.groups, 32), np.uint16),
            "order": cupy.empty((experts, rows), np.uint16),
            "bases": None,
            "words": None,
            "row_scale": cupy.empty((experts, rows, layout.scales), np.uint16),
            "column_scale": stack.arrays["column_scale"].copy(),
        }
        workspace = Workspace(limits, Library(device).empty)
        unscaled = _unscaled(stack, cupy)

        def batches() -> Iterator[tuple[int, Any]]:
            for first in range(0, experts, batch):
                part = levels[: min(batch, experts - first)]
                decoding = launch_plan.decode(unscaled, first, len(part), part, workspace)
                execute(decoding, device, stream)
                yield first, part

        for first, part in batches():
            execute([runs.sizes(layout, part, sizes[first:], highest, limits)], device, stream)
        places = cupy.asarray(runs.places(layout))
        ordering = runs.order(layout, sizes, places, stack.arrays["row_scale"], arrays)
        execute([ordering, runs.offsets(layout, sizes, arrays)], device, stream)
        ends = np.cumsum(arrays["offsets"].get()[:, -1].astype(np.uint64) // 32 * layout.bits)
        bases = np.concatenate([[0], ends[:-1]]).astype(np.uint64)
        arrays["bases"] = cupy.asarray(bases)
        arrays["words"] = cupy.zeros((int(ends[-1]) + runs.GUARD, 32), np.uint32)
        for first, part in batches() if batch < experts else [(0, levels)]:
            execute([runs.codes(layout, part, arrays, first, limits)], device, stream)
        stream.synchronize()
    return PackedRuns(layout, arrays, int(highest.get()[0]))


def _unscaled(stack: PackedStack, cupy: Any) -> PackedStack:
    """The stack with scales of 1, so that its weights are its levels."""
    high, low = 0x3F80, 0xBF80  # 1 and -1 in bf16
    arrays = dict(stack.arrays)
    scales = np.empty(arrays["row_scale"].shape, np.uint16)
    scales[..., 0], scales[..., -1] = low, high
    arrays["row_scale"] = cupy.asarray(scales)
    arrays["column_scale"] = cupy.asarray(np.full(arrays["column_scale"].shape, high, np.uint16))
    return replace(stack, arrays=arrays)
