"""TopK and CumSum as plain loops, where TVM would call a library of its own for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

__all__ = ["sort_in_loops"]

_OPAQUE = 8  # nothing is fused with such a function


def sort_in_loops(module: Any) -> Any:
    """Replace relax.topk and relax.cumsum in `main` by calls of functions on loops."""
    import tvm
    from tvm import relax

    @relax.expr_functor.mutator
    class Rewriter(relax.PyExprMutator):
        def visit_call_(self, op: Any) -> Any:
            call: Any = super().visit_call_(op)
            name = str(getattr(call.op, "name", ""))
            write = _FUNCTIONS.get(name)
            function = write(call) if write else None
            if function is None:
                return call
            variable = self.builder_.add_func(function, name.removeprefix("relax."))
            results = list(call.ty.fields) if hasattr(call.ty, "fields") else call.ty
            return relax.call_tir(variable, relax.Tuple([call.args[0]]), results)

    rewriter = Rewriter(module)
    new: Any = rewriter.visit_expr(module["main"])
    rewriter.builder_.update_func(module.get_global_var("main"), new)
    made = rewriter.builder_.get()
    return tvm.IRModule(dict(made.functions_items()), attrs=module.attrs)


def _topk(call: Any) -> Any:
    """Insert one element after the other into the best so far; of equals the first comes first."""
    from graphopt_backends.kernels.emit import T, bind, tirx, when

    attributes, shape = call.attrs, _shape(call.args[0])
    if str(attributes.ret_type) != "both":
        return None
    axis = int(attributes.axis) % len(shape)
    count = _shape_of(call.ty.fields[0])[axis]
    kinds = [str(field.dtype) for field in call.ty.fields]
    best = {axis: count}

    def before(a: Any, b: Any) -> Any:
        return a > b if bool(attributes.largest) else a < b

    def body(source: Any, values: Any, places: Any) -> None:
        with _lines(shape, axis) as at, T.serial(0, shape[axis]) as i:
            new = bind(source[at(i)])
            with T.serial(0, count) as back:
                slot = bind(count - 1 - back)
                earlier = at(tirx.max(slot - 1, 0))
                pushed = tirx.all(slot > 0, slot <= i, before(new, values[earlier]))

                def put(value: Any, place: Any, slot: Any = slot) -> None:
                    T.buffer_store(values, value, at(slot))
                    T.buffer_store(places, place, at(slot))

                when(pushed, lambda e=earlier, put=put: put(values[e], places[e]))
                # an element that was pushed away left its slot to the new one, or to one pushed after it
                free = tirx.any(slot == i, tirx.all(slot < i, before(new, values[at(slot)])))
                when(
                    tirx.all(tirx.Not(pushed), slot <= i, free),
                    lambda n=new, i=i, put=put: put(n, tirx.Cast(kinds[1], i)),
                )

    outputs = [(tuple(best.get(k, size) for k, size in enumerate(shape)), kind) for kind in kinds]
    return _function("topk", [(shape, str(call.args[0].ty.dtype))], outputs, body)


def _cumsum(call: Any) -> Any:
    """Add each element to the sum of those before it."""
    from graphopt_backends.kernels.emit import T, tirx

    shape, kind = _shape(call.args[0]), str(call.ty.dtype)
    if call.attrs.axis is None or str(call.args[0].ty.dtype) != kind:
        return None
    axis, exclusive = int(call.attrs.axis) % len(shape), bool(call.attrs.exclusive)

    def body(source: Any, sums: Any) -> None:
        with _lines(shape, axis) as at, T.serial(0, shape[axis]) as i:
            before = at(tirx.max(i - 1, 0))
            held = tirx.if_then_else(i > 0, sums[before], tirx.const(0, kind))
            if exclusive:
                new = tirx.if_then_else(i > 0, held + source[before], tirx.const(0, kind))
            else:
                new = held + source[at(i)]
            T.buffer_store(sums, new, at(i))

    return _function("cumsum", [(shape, kind)], [(shape, kind)], body)


def _function(name: str, inputs: Sequence[Any], outputs: Sequence[Any], body: Callable[..., None]) -> Any:
    from tvm.script.ir_builder import IRBuilder

    from graphopt_backends.kernels.emit import T

    builder = IRBuilder()
    with builder, T.prim_func():
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": _OPAQUE})
        body(*(T.arg(f"tensor{i}", T.buffer(*spec)) for i, spec in enumerate((*inputs, *outputs))))
    return builder.get()


@contextmanager
def _lines(shape: Sequence[int], axis: int) -> Iterator[Callable[[Any], tuple[Any, ...]]]:
    """Loops over all axes but one; yields what makes an index of a place on that one."""
    from graphopt_backends.kernels.emit import T

    with ExitStack() as loops:
        others = [loops.enter_context(T.serial(0, size)) for k, size in enumerate(shape) if k != axis]
        yield lambda place: (*others[:axis], place, *others[axis:])


def _shape(value: Any) -> tuple[int, ...]:
    return _shape_of(value.ty)


def _shape_of(ty: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in ty.shape)


_FUNCTIONS: Mapping[str, Callable[[Any], Any]] = {"relax.topk": _topk, "relax.cumsum": _cumsum}
