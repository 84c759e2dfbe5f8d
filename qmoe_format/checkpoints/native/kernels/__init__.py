"""Numba kernels that decode one matrix of a native format.

    rows     formats whose codes lie in the order of the decoded weights
    columns  those whose decoded matrix is the transpose of what is stored

All write float32 into ``out``, whose shape decides how much is decoded. ``zeros`` and ``scales``
are float32; a weight is ``(code - zero) * scale``, and only the product rounds. Arrays are
contiguous. Nothing here checks bounds.
"""
