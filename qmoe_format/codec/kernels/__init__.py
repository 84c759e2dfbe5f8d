"""Numba kernels: encode trits, decode them, multiply without decoding them.

    encoding   trits to segments
    chunks     what a chunk of a segment holds: the first stage of all decoding
    decoding   segments to trits, and to weights
    products   segments times vectors

Every decoding kernel takes the segments ``first`` to ``last`` and returns ``OK`` or
``segment * 8 + reason``. None reads or writes outside its arrays whatever the segments hold, given
that ``lengths`` and ``shortest`` add up to what is in ``segments`` and at least 8 bytes follow.

Numba's cache of a kernel is renewed when the file of that kernel changes: after a change in
``chunks``, or in ``lanes`` and ``memory`` beside this folder, delete ``__pycache__`` here.
"""
