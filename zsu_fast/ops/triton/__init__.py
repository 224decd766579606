"""Triton kernels, one module per op; a module is imported when its backend is chosen."""
