"""Kernels for CPUs: TensorIR written by generators, one for each family of operators; nothing is searched or tuned."""
