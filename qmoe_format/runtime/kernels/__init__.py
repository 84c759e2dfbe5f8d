"""Compiled kernels of the runtime."""
