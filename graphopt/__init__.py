"""Prune, quantize, compile and check any ONNX model.

    import graphopt
    result = graphopt.optimize("model.onnx", "prune{ratio=0.5},quant", "arm", calibration="calib.npz")
    outputs = graphopt.load(result.path)({"input": x})

Names are imported when they are first used, so that `import graphopt` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.bundle import Bundle as Bundle
    from graphopt.compile import Limits as Limits
    from graphopt.compile import Result as Result
    from graphopt.compile import optimize as optimize
    from graphopt.errors import ExitCode as ExitCode
    from graphopt.errors import GraphoptError as GraphoptError
    from graphopt.markers import hookimpl as hookimpl

    load = Bundle.open
    __version__: str

__all__ = ["Bundle", "ExitCode", "GraphoptError", "Limits", "Result", "__version__", "hookimpl", "load", "optimize"]

_HOMES = {
    "Bundle": "graphopt.bundle",
    "ExitCode": "graphopt.errors",
    "GraphoptError": "graphopt.errors",
    "Limits": "graphopt.compile",
    "Result": "graphopt.compile",
    "hookimpl": "graphopt.markers",
    "optimize": "graphopt.compile",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("graphopt")
    if name == "load":
        return __getattr__("Bundle").open
    if name not in _HOMES:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
