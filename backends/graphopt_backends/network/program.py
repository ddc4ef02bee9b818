"""A network as one function: kernels in order, on memory that was laid out before.

Launching a parallel region takes microseconds, a barrier inside of one a fraction of that, and calling a function on
pointers nothing. So every thread of a team walks through all steps and computes its share of each; behind a step the
runtime is told, and lets those wait that need what the others did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder

from graphopt_backends.kernels.emit import T, tirx, when
from graphopt_backends.network.steps import BEHIND, ENTRY, Step

__all__ = ["module"]

_ANY_SIZE = 1 << 46


def module(
    kernels: Mapping[str, Any],
    parameters: Sequence[str],
    steps: Sequence[Step],
    others: Mapping[str, Any] | None = None,
) -> Any:
    """An IRModule with the kernels and their entry function.

    Args:
        kernels: Private functions by name.
        parameters: Pointers that the entry function takes; scratch memory lies in the one called `workspace`.
        steps: Calls in order.
        others: Public functions besides.
    """
    variables = {name: tvm.ir.GlobalVar(name) for name in kernels}
    functions = {variables[name]: function for name, function in kernels.items()}
    functions[tvm.ir.GlobalVar(ENTRY)] = _entry(variables, parameters, steps)
    functions |= {tvm.ir.GlobalVar(name): function for name, function in (others or {}).items()}
    return tvm.IRModule(functions)


def _entry(variables: Mapping[str, Any], parameters: Sequence[str], steps: Sequence[Step]) -> Any:
    builder = IRBuilder()
    with builder, T.prim_func():
        T.func_name(ENTRY)
        T.func_attr({"global_symbol": ENTRY, "tirx.noalias": True, "tirx.is_scheduled": True})
        handles = {name: T.arg(f"memory{i}", T.handle("uint8")) for i, name in enumerate(parameters)}
        team, task, tasks = T.arg("team", T.handle()), T.arg("task", T.int32()), T.arg("tasks", T.int32())
        memory = {name: T.decl_buffer((_ANY_SIZE,), "uint8", data=handle) for name, handle in handles.items()}

        def call(step: Step, task: Any, tasks: Any) -> None:
            args = [tirx.address_of(memory[p.parameter][tirx.const(p.offset, "int64")]) for p in step.places]
            if step.scratch:
                own = tirx.const(step.scratch_at, "int64") + tirx.Cast("int64", task) * step.scratch
                args.append(tirx.address_of(memory["workspace"][own]))
            T.evaluate(tvm.ir.Call(variables[step.kernel], [*args, task, tasks], ret_ty="void"))

        alone = tirx.const(0, "int32"), tirx.const(1, "int32")
        for number, (step, following) in enumerate(pairwise((*steps, None))):
            assert step is not None
            if step.shared:
                call(step, task, tasks)
            else:
                when(task == 0, lambda step=step: call(step, *alone))
            meet = following is None or step.shared or following.shared
            flags = [tirx.const(number, "int32"), tirx.const(int(meet), "int32")]
            T.evaluate(tirx.call_extern("void", BEHIND, team, task, tasks, *flags))
    return builder.get()
