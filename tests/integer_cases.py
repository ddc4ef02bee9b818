"""Networks of one operator that an NPU computes on integers, as ONNX text: signature, body and weights."""

from __future__ import annotations

from small_models import Shape

IMAGE, ROWS = "(float[1,4,8,8] x) => (float y)", "(float[1,6,8] x) => (float y)"

WEIGHED: dict[str, tuple[str, str, dict[str, Shape]]] = {
    "Conv": (IMAGE, "y = Conv<pads = [1,1,1,1]>(x, w, b)", {"w": (6, 4, 3, 3), "b": (6,)}),
    "grouped Conv": (IMAGE, "y = Conv<group = 2>(x, w)", {"w": (6, 2, 3, 3)}),
    "depthwise Conv": (IMAGE, "y = Conv<group = 4>(x, w, b)", {"w": (4, 1, 3, 3), "b": (4,)}),
    "ConvTranspose": (IMAGE, "y = ConvTranspose<strides = [2,2]>(x, w, b)", {"w": (4, 3, 2, 2), "b": (3,)}),
    "Gemm": ("(float[2,8] x) => (float[2,5] y)", "y = Gemm<transB = 1>(x, w, b)", {"w": (5, 8), "b": (5,)}),
    "MatMul": (ROWS, "y = MatMul(x, w)", {"w": (8, 5)}),
}
ALONE: dict[str, tuple[str, str, dict[str, Shape]]] = {
    "Add": ("(float[1,4,8,8] x, float[1,4,8,8] z) => (float y)", "y = Add(x, z)", {}),
    "Sub": ("(float[1,4,8,8] x, float[1,4,8,8] z) => (float y)", "y = Sub(x, z)", {}),
    "Mul": ("(float[1,4,8,8] x, float[1,4,1,1] z) => (float y)", "y = Mul(x, z)", {}),
    "Max": ("(float[1,4,8,8] x, float[1,4,8,8] z) => (float y)", "y = Max(x, z)", {}),
    "Min": ("(float[1,4,8,8] x, float[1,4,8,8] z) => (float y)", "y = Min(x, z)", {}),
    "MatMul of activations": ("(float[2,6,8] x, float[2,8,6] z) => (float y)", "y = MatMul(x, z)", {}),
    "Add of channels": (IMAGE, "y = Add(x, c)", {"c": (1, 4, 1, 1)}),
    "Sub from channels": (IMAGE, "y = Sub(c, x)", {"c": (4, 1, 1)}),
    "Mul by a tensor": (IMAGE, "y = Mul(x, c)", {"c": (4, 8, 8)}),
    "PRelu of channels": (IMAGE, "y = PRelu(x, c)", {"c": (4, 1, 1)}),
    "Concat": ("(float[1,4,8,8] x, float[1,2,8,8] z) => (float y)", "y = Concat<axis = 1>(x, z)", {}),
    "BatchNormalization": (
        IMAGE, "y = BatchNormalization(x, s, o, m, var)", {"s": (4,), "o": (4,), "m": (4,), "var": (4,)}
    ),
    "AveragePool": (IMAGE, "y = AveragePool<kernel_shape = [2,2], strides = [2,2]>(x)", {}),
    "GlobalAveragePool": (IMAGE, "y = GlobalAveragePool(x)", {}),
    "ReduceMean": (IMAGE, "y = ReduceMean<axes = [2,3], keepdims = 0>(x)", {}),
    "ReduceSum": (IMAGE, "a = Constant<value = int64[1] {1}>() y = ReduceSum(x, a)", {}),
    "Softmax": (ROWS, "y = Softmax<axis = -1>(x)", {}),
}  # fmt: skip
MOVED: dict[str, tuple[str, str, dict[str, Shape]]] = {
    "MaxPool": (IMAGE, "y = MaxPool<kernel_shape = [2,2]>(x)", {}),
    "GlobalMaxPool": (IMAGE, "y = GlobalMaxPool(x)", {}),
    "ReduceMax": (IMAGE, "y = ReduceMax<axes = [1]>(x)", {}),
    "Reshape": (IMAGE, "s = Constant<value = int64[2] {4, 64}>() y = Reshape(x, s)", {}),
    "Flatten": (IMAGE, "y = Flatten(x)", {}),
    "Transpose": (IMAGE, "y = Transpose<perm = [0,2,3,1]>(x)", {}),
    "Squeeze": (IMAGE, "a = Constant<value = int64[1] {0}>() y = Squeeze(x, a)", {}),
    "Unsqueeze": (IMAGE, "a = Constant<value = int64[1] {0}>() y = Unsqueeze(x, a)", {}),
    "Identity": (IMAGE, "y = Identity(x)", {}),
    "Slice": (
        IMAGE,
        "s = Constant<value = int64[1] {1}>() e = Constant<value = int64[1] {3}>() y = Slice(x, s, e, s)",
        {},
    ),
    "Pad": (IMAGE, "p = Constant<value = int64[8] {0,0,1,1,0,0,1,1}>() y = Pad(x, p)", {}),
    "Resize nearest": (
        IMAGE,
        'e = Constant<value = float[4] {1.0,1.0,2.0,2.0}>() y = Resize<mode = "nearest">(x, , e)',
        {},
    ),
    "Resize linear": (
        IMAGE,
        'e = Constant<value = float[4] {1.0,1.0,2.0,2.0}>() y = Resize<mode = "linear">(x, , e)',
        {},
    ),
    "DepthToSpace": (IMAGE, "y = DepthToSpace<blocksize = 2>(x)", {}),
}
NUMBER = "c = Constant<value = float {1.5}>()"
FUNCTIONS = {
    "Sigmoid": "y = Sigmoid(x)", "Tanh": "y = Tanh(x)", "HardSwish": "y = HardSwish(x)", "Relu": "y = Relu(x)",
    "HardSigmoid": "y = HardSigmoid<alpha = 0.2>(x)", "Gelu": "y = Gelu(x)", "Erf": "y = Erf(x)", "Elu": "y = Elu(x)",
    "LeakyRelu": "y = LeakyRelu<alpha = 0.1>(x)", "Exp": "y = Exp(x)", "Abs": "y = Abs(x)", "Neg": "y = Neg(x)",
    "Mish": "y = Mish(x)", "Softplus": "y = Softplus(x)", "Clip": f"{NUMBER} y = Clip(x, , c)",
    "PRelu": f"{NUMBER} y = PRelu(x, c)", "Add": f"{NUMBER} y = Add(c, x)", "Sub": f"{NUMBER} y = Sub(c, x)",
    "Mul": f"{NUMBER} y = Mul(x, c)", "Div": f"{NUMBER} y = Div(x, c)", "Max": f"{NUMBER} y = Max(x, c)",
    "square": "y = Mul(x, x)",
}  # fmt: skip
CHAINS = {
    "HardSwish": "t = Constant<value = float {3.0}>() z = Constant<value = float {0.0}>() "
    "s = Constant<value = float {6.0}>() a = Add(x, t) b = Clip(a, z, s) m = Mul(x, b) y = Div(m, s)",
    "Swish": "s = Sigmoid(x) y = Mul(x, s)",
    "Mish": "s = Softplus(x) t = Tanh(s) y = Mul(x, t)",
    "Gelu": "r = Constant<value = float {1.4142135}>() o = Constant<value = float {1.0}>() "
    "k = Constant<value = float {0.5}>() d = Div(x, r) e = Erf(d) a = Add(e, o) m = Mul(x, a) y = Mul(m, k)",
    "twice read inside": "o = Constant<value = float {2.0}>() t = Mul(x, o) s = Sigmoid(t) y = Mul(t, s)",
}
