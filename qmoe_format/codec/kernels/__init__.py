"""Numba kernels: encode levels, decode them, multiply without decoding them.

    encode     levels to segments
    decode     segments to levels, and to weights
    dot        segments times vectors

and what they are made of:

    scan       the chunks of a segment as lists of non-zeros
    refinement the magnitudes of a segment's non-zeros
    cursor     the rows of a chunk
    int_group  packed integers: their weights and products
    tables     look-up tables of a dictionary
    unaligned, simd    memory and vector instructions that Numba lacks
    vector_type        and the type of vectors
    jit        how all of it is compiled and cached

Every decoding kernel takes the segments ``first`` to ``last`` and returns ``OK`` or
``segment * REASONS + reason``. None reads or writes outside its arrays whatever the segments hold,
given that ``lengths`` and ``length_base`` add up to the bytes of ``segments`` and at least 8 more
follow.

Kernels take plain tuples and give their elements names inside (``as_segments``, ``as_entries``):
Numba finds the type of a NamedTuple in Python, 3 microseconds each in every call.
"""
