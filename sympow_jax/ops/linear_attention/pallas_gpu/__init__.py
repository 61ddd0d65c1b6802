"""Degree-2 power attention as fused GPU kernels, in Triton's semantics."""
