"""Triton kernels, one module an op; a module is imported when its backend is chosen."""
