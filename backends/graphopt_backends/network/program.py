"""A network as one function: kernels in order, in one parallel region, on memory that was laid out before.

Launching a parallel region takes microseconds, a barrier inside of one a fraction of that, and calling a function on
pointers nothing. So the whole network is one region: every task walks through all steps and computes its share of
each; tasks wait for each other between two steps that are not one task's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder

from graphopt_backends.kernels.emit import T, tirx

__all__ = ["Place", "Step", "module"]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: an offset in bytes in a parameter of the entry function."""

    parameter: str
    offset: int = 0


@dataclass(frozen=True)
class Step:
    """A call of a kernel.

    Attributes:
        kernel: Name of its function.
        places: Its pointers, in order.
        tasks: How many tasks share it.
        scratch: Bytes of the workspace that each task needs for itself, the kernel's last pointer; 0: it has none.
        scratch_at: Where the first task's part of it begins.
    """

    kernel: str
    places: tuple[Place, ...]
    tasks: int
    scratch: int = 0
    scratch_at: int = 0


def module(kernels: Mapping[str, Any], parameters: Mapping[str, int], steps: Sequence[Step]) -> Any:
    """An IRModule with the kernels and their entry function `main`.

    Args:
        kernels: Private functions by name.
        parameters: Bytes behind each parameter of `main`, in order; scratch memory lies in the one called `workspace`.
        steps: Calls in order.
    """
    variables = {name: tvm.ir.GlobalVar(name) for name in kernels}
    functions = {variables[name]: function for name, function in kernels.items()}
    functions[tvm.ir.GlobalVar("main")] = _entry(variables, parameters, steps)
    return tvm.IRModule(functions)


def _entry(variables: Mapping[str, Any], parameters: Mapping[str, int], steps: Sequence[Step]) -> Any:
    builder = IRBuilder()
    with builder, T.prim_func():
        T.func_name("main")
        T.func_attr({"global_symbol": "main", "tirx.noalias": True, "tirx.is_scheduled": True})
        memory = {name: T.arg(name, T.buffer((size,), "uint8")) for name, size in parameters.items()}
        with _pragma("parallel_launch_point"):
            for step in steps:
                with (
                    _pragma("parallel_barrier_when_finish"),
                    _pragma("parallel_stride_pattern"),
                    T.parallel(0, step.tasks) as task,
                ):
                    args = [tirx.address_of(memory[p.parameter][p.offset]) for p in step.places]
                    if step.scratch:
                        own = step.scratch_at + task * step.scratch
                        args.append(tirx.address_of(memory["workspace"][own]))
                    args += [task, tirx.const(step.tasks, "int32")]
                    T.evaluate(tvm.ir.Call(variables[step.kernel], args, ret_ty="void"))
    return builder.get()


def _pragma(name: str) -> Any:
    return T.attr(tirx.const(0, "int32"), f"pragma_{name}", tirx.const(1, "int32"))
