"""Degree-2 power and Taylor attention as fused TPU kernels."""
