"""Zeros inside weights: unstructured, or N of every M."""
