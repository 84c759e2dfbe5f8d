"""Numba kernels of the recipe ``rd``: sixteen rows of a matrix at a time, one in each lane."""
