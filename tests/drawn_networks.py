"""Random networks for property tests: blocks of every kind, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
from hypothesis import strategies as st
from small_models import IMAGE, Shape, build


class Drawing:
    """Writes a random network block by block; every block takes and gives `[N, channels, 8, 8]`."""

    def __init__(self, pick: Callable[[Sequence], object]) -> None:
        self.pick, self.lines, self.weights = pick, list[str](), dict[str, Shape]()
        self.channels = self.pick([2, 3, 5, 4])
        self.current = self.conv("x", 3, self.channels)

    def weight(self, *shape: int, stem: str = "w") -> str:
        name = f"{stem}{len(self.weights)}"
        self.weights[name] = shape
        return name

    def value(self, text: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name

    def conv(self, source: str, inside: int, outside: int, group: int = 1) -> str:
        size = self.pick([1, 3])
        weight = self.weight(outside, inside // group, size, size)
        pad = size // 2
        return self.value(
            f"Conv<pads=[{pad},{pad},{pad},{pad}],group={group}>({source}, {weight}, {self.weight(outside)})"
        )

    def plain(self) -> None:
        channels = self.pick([2, 3, 4, 6])
        self.current, self.channels = self.conv(self.current, self.channels, channels), channels

    def norm(self) -> None:
        parameters = [self.weight(self.channels, stem=stem) for stem in ("w", "w", "w", "var")]
        self.current = self.value(f"BatchNormalization({self.current}, {', '.join(parameters)})")

    def activation(self) -> None:
        form = self.pick(["Relu", "Sigmoid", "HardSwish", "LeakyRelu", "PRelu"])
        slope = f", {self.weight(self.channels, 1, 1)}" if form == "PRelu" else ""
        self.current = self.value(f"{form}({self.current}{slope})")

    def residual(self) -> None:
        branch = self.conv(self.value(f"Relu({self.current})"), self.channels, self.channels)
        operator = self.pick(["Mul", "Sub", "Max", "Add"])
        self.current = self.value(f"{operator}({branch}, {self.current})")

    def depthwise(self) -> None:
        multiplier = self.pick([1, 2])
        self.current = self.conv(self.current, self.channels, self.channels * multiplier, group=self.channels)
        self.channels *= multiplier

    def grouped(self) -> None:
        if self.channels % 2 == 0:
            self.current = self.conv(self.current, self.channels, 4, group=2)
            self.channels = 4

    def concat(self) -> None:
        other = self.pick([1, 2, 4])
        branch = self.conv(self.current, self.channels, other)
        self.current = self.value(f"Concat<axis=1>({self.current}, {branch})")
        self.channels += other

    def split(self) -> None:
        if self.channels % 2 == 0:
            self.lines.append(f"a{len(self.lines)}, b{len(self.lines)} = Split<axis=1>({self.current})")
            number = len(self.lines) - 1
            self.current = self.value(f"Mul(a{number}, b{number})")
            self.channels //= 2

    def excite(self) -> None:
        pooled = self.value(f"GlobalAveragePool({self.current})")
        gate = self.value(f"HardSigmoid({self.conv(pooled, self.channels, self.channels)})")
        self.current = self.value(f"Mul({self.current}, {gate})")

    def padded(self) -> None:
        pads = self.value("Constant<value_ints=[0,1,0,0,0,2,0,0]>()")
        self.current, self.channels = self.value(f"Pad({self.current}, {pads})"), self.channels + 3

    def turned(self) -> None:
        last = self.value(f"Transpose<perm=[0,2,3,1]>({self.current})")
        mixed = self.value(f"MatMul({last}, {self.weight(self.channels, 4)})")
        self.current, self.channels = self.value(f"Transpose<perm=[0,3,1,2]>({mixed})"), 4

    def upsampled(self) -> None:
        pooled = self.value(f"MaxPool<kernel_shape=[2,2],strides=[2,2]>({self.current})")
        deconv = self.weight(self.channels, 3, 2, 2)
        self.current = self.value(f"ConvTranspose<strides=[2,2]>({pooled}, {deconv}, {self.weight(3)})")
        self.channels = 3

    def finish(self) -> ir.Model:
        head = self.pick(["pool", "reshape", "mean", "flatten"])
        columns = self.channels
        if head == "pool":
            flat = self.value(f"Flatten({self.value(f'GlobalAveragePool({self.current})')})")
        elif head == "mean":
            flat = self.value(f"ReduceMean<axes=[2,3],keepdims=0>({self.current})")
        else:
            small = self.value(f"AveragePool<kernel_shape=[4,4],strides=[4,4]>({self.current})")
            columns = 4 * self.channels
            shape = self.value(f"Constant<value_ints=[-1,{columns}]>()")
            flat = self.value(f"Flatten({small})" if head == "flatten" else f"Reshape({small}, {shape})")
        self.lines.append(f"y = Gemm({flat}, {self.weight(columns, 5)}, {self.weight(5)})")
        return build(IMAGE, "\n".join(self.lines), self.weights)


BLOCKS = (
    "plain", "norm", "activation", "residual", "depthwise", "grouped", "concat", "split", "excite", "padded", "turned",
    "upsampled",
)  # fmt: skip


@st.composite
def networks(draw: st.DrawFn) -> ir.Model:
    drawing = Drawing(lambda options: draw(st.sampled_from(options)))
    for name in draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6)):
        getattr(drawing, name)()
    return drawing.finish()
