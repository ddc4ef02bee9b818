"""Quantized linear operators computed on integers, value for value as ONNX Runtime computes them.

    conv(dequantize(x), dequantize(w))           float(conv(x - zero point, w)) * (scale of x * scale of w)
    ... + dequantize(bias)                       the bias is added to the integer sum
    quantize(relu(...)) of either                scale of x * scale of w / scale of the output; rounded half to even

Sums are 32-bit and exact, so the result does not depend on the order of additions, which the float form does.
Constants that are only reshaped or transposed are replaced by their result.
Only constant scales, zero points and weights qualify; everything else keeps its float form.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["use_integers"]

_CONVOLUTIONS = ("relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d")


def use_integers(module: Any) -> Any:
    """Rewrite quantized convolutions and matrix products of `main` to integer sums."""
    import tvm
    from tvm import relax

    @relax.expr_functor.mutator
    class Rewriter(relax.PyExprMutator):
        def visit_call_(self, op: Any) -> Any:
            call: Any = super().visit_call_(op)
            name = getattr(call.op, "name", "")
            rule = _RULES.get(name)
            new = rule(self.builder_, call) if rule else None
            return call if new is None else new

    rewriter = Rewriter(module)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            new: Any = rewriter.visit_expr(function)
            rewriter.builder_.update_func(variable, new)
    result = rewriter.builder_.get()
    return tvm.IRModule(dict(result.functions_items()), attrs=module.attrs)


def _follow(builder: Any, expr: Any) -> Any:
    """The expression behind a variable."""
    from tvm import relax

    while isinstance(expr, relax.Var):
        bound = builder.lookup_binding(expr)
        if bound is None:
            return expr
        expr = bound
    return expr


def _is_call(expr: Any, name: str) -> bool:
    return getattr(getattr(expr, "op", None), "name", "") == name


def _array(expr: Any) -> np.ndarray | None:
    """Payload of a constant."""
    value = getattr(expr, "value", None)
    return value.numpy() if value is not None and hasattr(value, "numpy") else None


def _dequantized(builder: Any, expr: Any) -> tuple[Any, np.ndarray, np.ndarray, int] | None:
    """Integer tensor, scale, zero point and axis of a dequantize with constant parameters."""
    expr = _follow(builder, expr)
    if not _is_call(expr, "relax.dequantize"):
        return None
    scale, zero = _array(_follow(builder, expr.args[1])), _array(_follow(builder, expr.args[2]))
    kind = str(expr.args[0].ty.dtype)
    if scale is None or zero is None or scale.dtype != np.float32 or kind not in ("int8", "uint8", "int32"):
        return None
    return expr.args[0], scale.reshape(-1), zero.reshape(-1), int(expr.attrs.axis)


def _shifted(builder: Any, data: Any, zero: np.ndarray) -> Any:
    """Integers minus their zero point, in the narrowest type that holds them."""
    from tvm import relax

    kind = str(data.ty.dtype)
    if not zero.any() and kind == "int8":
        return data
    array = _array(_follow(builder, data))
    if array is not None:
        return relax.const(array.astype(np.int16) - np.int16(zero[0]), "int16")
    wide = builder.emit(relax.op.astype(data, "int16"))
    return builder.emit(relax.op.subtract(wide, relax.const(int(zero[0]), "int16"))) if zero.any() else wide


def _rearranged(builder: Any, call: Any) -> Any:
    """A constant in another shape, made here: TVM would compile a function for each."""
    from tvm import relax

    array = _array(_follow(builder, call.args[0]))
    if array is None or array.dtype.kind not in "fiub":
        return None
    if call.op.name == "relax.permute_dims":
        axes = call.attrs.axes
        return relax.const(np.ascontiguousarray(array.transpose([int(a) for a in axes] if axes else None)))
    return relax.const(array.reshape([int(size) for size in call.ty.shape]))


def _linear(builder: Any, call: Any) -> Any:
    """The integer form of a convolution or matrix product of dequantized tensors."""
    from tvm import relax

    convolution = call.op.name in _CONVOLUTIONS
    left, right, transposed = call.args[0], call.args[1], False
    behind = _follow(builder, right)
    if not convolution and _is_call(behind, "relax.permute_dims") and len(right.ty.shape) == 2:
        right, transposed = behind.args[0], True
    a, b = _dequantized(builder, left), _dequantized(builder, right)
    if a is None or b is None or "int32" in (str(a[0].ty.dtype), str(b[0].ty.dtype)):
        return None
    (x, x_scale, x_zero, _), (w, w_scale, w_zero, axis) = a, b
    rank = len(w.ty.shape)
    columns = 0 if convolution or transposed else rank - 1
    uniform = x_scale.size == 1 and x_zero.size == 1 and (not w_zero.any() or w_zero.size == 1)
    if not uniform or (w_scale.size > 1 and axis % rank != columns):
        return None
    x, w = _shifted(builder, x, x_zero), _shifted(builder, w, w_zero)
    scale = x_scale * w_scale
    if convolution:
        total = builder.emit(_convolve(call, x, w))
        scale = scale.reshape((1, -1) + (1,) * (rank - 2)) if scale.size > 1 else scale.reshape(())
    else:
        w = builder.emit(relax.op.permute_dims(w, [1, 0])) if transposed else w
        total = builder.emit(relax.op.matmul(x, w, out_dtype="int32"))
        scale = scale if scale.size > 1 else scale.reshape(())
    return relax.op.multiply(builder.emit(relax.op.astype(total, "float32")), relax.const(scale, "float32"))


def _convolve(call: Any, x: Any, w: Any) -> Any:
    from tvm import relax

    operators = dict(zip(_CONVOLUTIONS, (relax.op.nn.conv1d, relax.op.nn.conv2d, relax.op.nn.conv3d), strict=True))
    a = call.attrs
    return operators[call.op.name](
        x,
        w,
        strides=a.strides,
        padding=a.padding,
        dilation=a.dilation,
        groups=a.groups,
        data_layout=a.data_layout,
        kernel_layout=a.kernel_layout,
        out_dtype="int32",
    )


def _scaled_sum(builder: Any, expr: Any) -> tuple[Any, np.ndarray] | None:
    """Integer sum and scale of what `_linear` or `_bias` made."""
    expr = _follow(builder, expr)
    if not _is_call(expr, "relax.multiply"):
        return None
    cast, scale = _follow(builder, expr.args[0]), _array(_follow(builder, expr.args[1]))
    if scale is None or not _is_call(cast, "relax.astype") or str(cast.args[0].ty.dtype) != "int32":
        return None
    return cast.args[0], scale


def _bias(builder: Any, call: Any) -> Any:
    """Add a bias that is quantized with the scale of the sum to the sum itself."""
    from tvm import relax

    left, right = _scaled_sum(builder, call.args[0]), _follow(builder, call.args[1])
    if left is None:
        return None
    total, scale = left
    shape = None
    if _is_call(right, "relax.reshape"):
        shape, right = [int(d) for d in right.ty.shape], right.args[0]
    bias = _dequantized(builder, right)
    if bias is None or str(bias[0].ty.dtype) != "int32" or bias[2].any():
        return None
    values = _array(_follow(builder, bias[0]))
    if values is None or bias[1].size not in (1, scale.size) or not np.allclose(bias[1], scale.reshape(-1), 1e-5, 0):
        return None
    total = builder.emit(relax.op.add(total, relax.const(values.reshape(shape or values.shape), "int32")))
    return relax.op.multiply(builder.emit(relax.op.astype(total, "float32")), relax.const(scale, "float32"))


def _requantize(builder: Any, call: Any) -> Any:
    """Scale the sum straight to the output's scale; a ReLU that saturation does anyway is left out."""
    from tvm import relax

    scale, zero = _array(_follow(builder, call.args[1])), _array(_follow(builder, call.args[2]))
    if (
        scale is None
        or zero is None
        or scale.size != 1
        or zero.size != 1
        or str(call.attrs.out_dtype) not in ("int8", "uint8")
    ):
        return None
    source = _follow(builder, call.args[0])
    if _is_call(source, "relax.nn.relu") and int(zero.reshape(-1)[0]) == np.iinfo(zero.dtype).min:
        source = _follow(builder, source.args[0])
    found = _scaled_sum(builder, source)
    if found is None:
        return None
    total, inner = found
    ratio = (inner / scale.reshape(-1)[0]).astype(np.float32)
    scaled = builder.emit(
        relax.op.multiply(builder.emit(relax.op.astype(total, "float32")), relax.const(ratio, "float32"))
    )
    return relax.op.quantize(
        scaled,
        relax.const(1.0, "float32"),
        call.args[2],
        axis=call.attrs.axis,
        out_dtype=call.attrs.out_dtype,
    )


_RULES = {
    **dict.fromkeys(_CONVOLUTIONS, _linear),
    "relax.expand_dims": _rearranged,
    "relax.matmul": _linear,
    "relax.permute_dims": _rearranged,
    "relax.reshape": _rearranged,
    "relax.squeeze": _rearranged,
    "relax.add": _bias,
    "relax.quantize": _requantize,
}
