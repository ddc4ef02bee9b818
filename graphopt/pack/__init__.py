"""Packed models: one file that holds a model with its tensors entropy-coded, and gives it back byte for byte.

`decoder` reads them and stands alone; `writer` makes them. docs/container.md describes the format.
"""

from graphopt.pack.reading import array, is_container, unpack
from graphopt.pack.writer import Packed, Row, check_coder, pack

__all__ = ["Packed", "Row", "array", "check_coder", "is_container", "pack", "unpack"]
