"""Which kernel computes a product with a constant: on vectors, or on tiles where the CPU has them and they pay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from graphopt.targets import Isa
from graphopt_backends.kernels.conv import Conv, Window
from graphopt_backends.kernels.epilogue import PLAIN, Epilogue
from graphopt_backends.kernels.gemm import Gemm
from graphopt_backends.kernels.multiply import Stored
from graphopt_backends.kernels.tile_conv import TileConv
from graphopt_backends.kernels.tile_gemm import TileGemm
from graphopt_backends.network.sums import Operands

__all__ = ["Convolution", "Product", "convolution", "on_tiles", "product"]

Product = Gemm | TileGemm
"""Rows times a packed weight."""

Convolution = Conv | TileConv
"""An image and packed filters."""


def product(
    isa: Isa, on: Operands, rows: int, columns: int, depth: int, epilogue: Epilogue, pitch: int, stored: Stored
) -> Product:
    """The kernel of a product; see `Gemm`."""
    if on.tiles:
        return TileGemm(isa, on.kind, rows, columns, depth, epilogue, pitch)
    return Gemm(isa, on.kind, rows, columns, depth, epilogue, pitch, stored=stored)


def convolution(
    isa: Isa, on: Operands, image: tuple[int, int, int, int], filters: int, window: Window, groups: int,
    epilogue: Epilogue, pitch: int, stored: Stored,
) -> Convolution:  # fmt: skip
    """The kernel of a convolution; see `Conv`.

    Args:
        isa: The CPU.
        on: What is convolved.
        image: Images, their height and width, and their channels.
        filters: Channels of the result.
        window: Taps.
        groups: Parts of the channels.
        epilogue: What happens to the sums.
        pitch: Elements from pixel to pixel of the image.
        stored: What weights are stored as.
    """
    zero = on.zero_point if isinstance(on.zero_point, int) else None
    family = TileConv if on.tiles else Conv
    return family(isa, on.kind, *image, filters, window, groups, epilogue, zero, pitch, stored=stored)


def on_tiles(on: Operands, kernel: Callable[[Operands, Epilogue], object]) -> Operands:
    """Let products of tiles make the sums where that kernel pays.

    Args:
        on: Operands.
        kernel: What would compute them.
    """
    tiled = replace(on, tiles=True)
    made = kernel(tiled, PLAIN)
    return tiled if isinstance(made, TileGemm | TileConv) and made.pays else on
