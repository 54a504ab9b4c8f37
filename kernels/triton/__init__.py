"""Triton kernels, one module an op, imported at the first call of the op's Triton backend."""
