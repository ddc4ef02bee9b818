"""The reference backend: what ships is the ONNX model itself, and ONNX Runtime runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from graphopt.backend_base import Backend, Build, BuildOptions, Finding, Obtained, Runnable
from graphopt.reference import Reference
from graphopt.targets import IntegerRules, Target

__all__ = ["TARGETS", "OrtBackend"]

TARGETS = (
    Target(
        name="ort",
        backend="ort",
        summary="portable ONNX for ONNX Runtime on any CPU; nothing is compiled",
        default=True,
        # without a dot-product instruction ONNX Runtime adds pairs of u8 x s8 products in 16 bits, which saturate with
        # 8-bit weights: 2 * 255 * 64 fits, 2 * 255 * 127 does not
        integers=IntegerRules(weight_bits=7, weights_at_load=True),
    ),
)


class OrtBackend(Backend):
    """Builds nothing; the bundle's `model.onnx` runs as it is."""

    name: ClassVar[str] = "ort"

    def build(self, model: ir.Model, target: Target, folder: Path, options: BuildOptions) -> Build:
        """Leave the folder as it is."""
        import onnxruntime

        return Build(facts={"engine": f"ONNX Runtime {onnxruntime.__version__}"})

    def how(self, target: Target) -> Obtained:
        """Executed, everywhere."""
        return "executed"

    def load(self, folder: Path, target: Target, threads: int) -> Runnable:
        """Open `model.onnx` in ONNX Runtime."""
        session = Reference(folder / "model.onnx", threads=max(threads, 1))
        return session.run

    def doctor(self, cache: Path) -> Sequence[Finding]:
        """Name the version of ONNX Runtime."""
        import onnxruntime

        return (Finding("ONNX Runtime", onnxruntime.__version__),)
