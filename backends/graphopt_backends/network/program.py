"""A network as one function: kernels in order, on memory that was laid out before.

Launching a parallel region takes microseconds, asking for a part of a step inside of one a fraction of that, and
calling a function on pointers nothing. So every thread of a team walks through all steps; the runtime says which parts
of each it computes, and lets it wait where it needs what the others did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder

from graphopt_backends.kernels.emit import T, bind, tirx, when
from graphopt_backends.network.steps import BEHIND, BETWEEN, DONE, ENTRY, TAKE, Step

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

        def tell(function: str, *numbers: Any) -> None:
            T.evaluate(tirx.call_extern("void", function, team, *(tirx.const(number, "int32") for number in numbers)))

        def taken(last: int, part: Any) -> Any:
            return tirx.call_extern("int32", TAKE, team, tirx.const(last, "int32"), part) != 0

        def part(step: Step, number: int, chosen: Any) -> None:
            call(step, chosen, tasks)
            tell(DONE, number)

        def alone(numbers: Sequence[int]) -> None:
            for number in numbers:
                call(steps[number], zero, one)
                tell(DONE if number == numbers[-1] else BETWEEN, number)

        zero, one = tirx.const(0, "int32"), tirx.const(1, "int32")
        for shared, run in groupby(range(len(steps)), key=lambda number: steps[number].shared):
            numbers = list(run)
            if shared:
                for number in numbers:
                    with T.serial(0, tasks) as i:
                        chosen = bind(tirx.truncmod(task + i, tasks))
                        when(taken(number, chosen), lambda n=number, c=chosen: part(steps[n], n, c))
                    T.evaluate(tirx.call_extern("void", BEHIND, team, tirx.const(number, "int32"), tasks))
            else:  # small steps in a row are one thread's, which then need not wait between them
                when(taken(numbers[-1], zero), lambda n=numbers: alone(n))
                T.evaluate(tirx.call_extern("void", BEHIND, team, tirx.const(numbers[-1], "int32"), one))
    return builder.get()
