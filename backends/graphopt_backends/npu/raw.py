"""Vela's raw output: what the driver of an Ethos-U wants to know about one command stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import BackendError

__all__ = ["Area", "Place", "Raw", "read_raw"]

Array = np.ndarray[Any, np.dtype[Any]]
_NOTHING = 1  # NumPy keeps an empty byte string as one byte


@dataclass(frozen=True)
class Area:
    """Memory behind one base address.

    Attributes:
        region: Which base address, counted from 0.
        size: Bytes; 0: it is not used.
    """

    region: int
    size: int


@dataclass(frozen=True)
class Place:
    """Where an input or output lies.

    Attributes:
        region: Behind which base address.
        offset: Bytes from there.
        elements: Number of elements.
        element_bytes: Size of each.
    """

    region: int
    offset: int
    elements: int
    element_bytes: int


@dataclass(frozen=True)
class Raw:
    """One command stream with all that belongs to it.

    Attributes:
        commands: What the driver hands to the NPU.
        weights: What it reads, encoded.
        weights_area: Where it expects them.
        scratch: Feature maps, with inputs and outputs.
        scratch_fast: The faster memory of systems that have two.
        inputs: In the order of the network.
        outputs: In the order of the network.
    """

    commands: bytes
    weights: bytes
    weights_area: Area
    scratch: Area
    scratch_fast: Area
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]

    @property
    def regions(self) -> int:
        """Number of base addresses that the driver wants."""
        areas = (self.weights_area, self.scratch, self.scratch_fast)
        return 1 + max([0, *(area.region for area in areas if area.size)])


def read_raw(path: Path) -> Raw:
    """Read `NAME_vela.npz`.

    Raises:
        BackendError: It is not what this version of Vela writes.
    """
    try:
        with np.load(path, allow_pickle=False) as data:  # quantization is kept as objects, and left alone
            weights = _bytes(data["weight_data"])
            return Raw(
                commands=_bytes(data["cmd_data"]),
                weights=weights,
                weights_area=Area(int(data["weight_region"]), len(weights)),
                scratch=_area(data, "scratch"),
                scratch_fast=_area(data, "scratch_fast"),
                inputs=_places(data, "input"),
                outputs=_places(data, "output"),
            )
    except (OSError, KeyError, ValueError) as e:
        raise BackendError(path.name, f"is no raw output of Vela: {e}", "compile the model again") from e


def _bytes(array: Array) -> bytes:
    return b"" if array.nbytes <= _NOTHING else array.tobytes()


def _area(data: Mapping[str, Array], name: str) -> Area:
    return Area(int(data[f"{name}_region"]), int(data[f"{name}_size"]))


def _places(data: Mapping[str, Array], side: str) -> tuple[Place, ...]:
    shapes, sizes = data[f"{side}_shape"].tolist(), data[f"{side}_elem_size"].tolist()
    regions, offsets = data[f"{side}_region"].tolist(), data[f"{side}_offset"].tolist()
    rows = zip(regions, offsets, shapes, sizes, strict=True)
    return tuple(Place(int(r), int(o), int(np.prod(shape, dtype=np.int64)), int(size)) for r, o, shape, size in rows)
