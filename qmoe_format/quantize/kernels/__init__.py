"""Numba kernels of the recipe ``rd``: 32 rows of a matrix at a time, one in each lane."""
