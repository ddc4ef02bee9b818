"""Random networks over tokens: attention, norms, shuffles and shape arithmetic in the spelling of every operator set.

Every block takes and gives `[N, T, width]`. Six tokens may be an image of 2 by 3; an open number of them may not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from drawn_spelling import Spelling
from hypothesis import strategies as st

OPSETS = (7, 8, 9, 11, 12, 13, 15, 17, 18, 20, 21, 23)
TOKENS = 6


class Transformer(Spelling):
    """Writes a random network block by block, as ONNX text."""

    def __init__(self, pick: Callable[[Sequence], object], opset: int, *, open_tokens: bool) -> None:
        super().__init__(pick, opset)
        self.open = open_tokens
        self.width, self.current, self.given, self.inside = 8, "x", True, False
        if pick([False, True]):
            self.current, self.width = self.linear("x", 8, 8), 8
            self.given = False

    # layers

    def linear(self, source: str, inside: int, outside: int) -> str:
        forms = ["plain", "plain", "bias", "bias"]
        forms += ["turned"] + ["dequantized"] * (self.opset >= 13 and not self.inside) + ["einsum"] * (self.opset >= 12)
        form = self.pick(forms)
        if form == "turned":
            weight = self.value(f"Transpose<perm=[1,0]>({self.weight(outside, inside)})")
        elif form == "dequantized":
            name, axis = f"w{len(self.arrays)}_int", self.pick([0, 1, -1])
            self.arrays[name] = self.rng.integers(-127, 127, (inside, outside)).astype(np.int8)
            scale = f"s{len(self.arrays)}"
            self.arrays[scale] = np.full(inside if axis == 0 else outside, 0.01, np.float32)
            weight = self.value(f"DequantizeLinear<axis={axis}>({name}, {scale})")
        elif form == "einsum":
            return self.value(f'Einsum<equation="ntc,oc->nto">({source}, {self.weight(outside, inside)})')
        else:
            weight = self.weight(inside, outside)
        made = self.value(f"MatMul({source}, {weight})")
        if form == "bias":
            sides = [made, self.weight(*self.pick([(outside,), (1, outside), (1, 1, outside)]))]
            made = self.value(f"Add({', '.join(sides[:: self.pick([1, -1])])})")
        return made

    def activate(self, source: str) -> str:
        forms = ["Relu", "Sigmoid", "Tanh", "Swish", "Clip", "LeakyRelu", "PRelu", "Square", "Twice", "Elu"]
        forms += (
            ["Erf", "Where"] * (self.opset >= 9) + ["Gelu"] * (self.opset >= 20) + ["HardSwish"] * (self.opset > 13)
        )
        form = self.pick(forms)
        if form == "Swish":
            return self.value(f"Mul({source}, {self.value(f'Sigmoid({source})')})")
        if form == "Clip":
            limits = f"<min=-1.0,max=1.5>({source})" if self.opset < 11 else f"({source}, , {self.number(1.5)})"
            return self.value(f"Clip{limits}")
        if form == "PRelu":
            return self.value(f"PRelu({source}, {self.number(0.2)})")
        if form in ("Square", "Twice"):
            return self.value(f"{'Mul' if form == 'Square' else 'Add'}({source}, {source})")
        if form == "Where":
            condition = self.value(f"Greater({source}, {self.number(0.1)})")
            return self.value(f"Where({condition}, {source}, {self.number(self.pick([0.0, 0.3]))})")
        return self.value(f"{form}({source})")

    # blocks

    def project(self) -> None:
        width = self.pick([4, 6, 8])
        self.current, self.width, self.given = self.linear(self.current, self.width, width), width, False

    def activated(self) -> None:
        self.current, self.given = self.activate(self.current), False

    def add(self, branch: str) -> None:
        self.current = self.value(f"Add({self.current}, {branch})")

    def mlp(self) -> None:
        inner = self.pick([4, 6])
        made = self.activate(self.linear(self.current, self.width, inner))
        self.add(self.linear(made, inner, self.width))

    def gated(self) -> None:
        inner = self.pick([4, 6])
        if self.pick([False, True]):
            gate, up = self.split(self.linear(self.current, self.width, 2 * inner), [inner, inner], self.pick([2, -1]))
        else:
            gate, up = (self.linear(self.current, self.width, inner) for _ in range(2))
        self.add(self.linear(self.value(f"Mul({self.activate(gate)}, {up})"), inner, self.width))

    def norm(self) -> None:
        forms = ["rms"] + ["operator"] * (self.opset >= 23)
        forms += ["layer"] * (self.opset >= 17 and self.given) + ["lp"]
        form = self.pick(forms)
        if form == "layer":
            bias = self.pick(["", f", {self.weight(self.width)}"])
            made = self.value(f"LayerNormalization<axis=-1>({self.current}, {self.weight(self.width)}{bias})")
        elif form == "operator":
            made = self.value(f"RMSNormalization<axis=-1>({self.current}, {self.weight(self.width)})")
        elif form == "lp":
            made = self.value(f"LpNormalization<axis=-1>({self.current})")
        else:
            square = self.value(self.pick([f"Mul({self.current}, {self.current})",
                                           f"Pow({self.current}, {self.number(2.0)})"]))  # fmt: skip
            summed = self.value(f"Add({self.mean(square, [self.pick([2, -1])])}, {self.number(0.01)})")
            root = self.value(f"Sqrt({summed})")
            made = self.value(self.pick([f"Div({self.current}, {root})",
                                         f"Mul({self.current}, {self.value(f'Reciprocal({root})')})"]))  # fmt: skip
            if self.pick([True, True, False]):
                made = self.value(f"Mul({made}, {self.weight(self.width)})")
        self.current = made

    def heads(self, source: str, count: int, size: int) -> str:
        """`[N, T, count * size]` as `[N, count, T, size]`."""
        shape = self.pick([(0, 0, count, size), (0, 0, count, -1), (0, 0, -1, size)])
        return self.value(f"Transpose<perm=[0,2,1,3]>({self.reshape(source, *shape)})")

    def three(self, heads: int, size: int) -> list[str]:
        """Queries, keys and values `[N, heads, T, size]`, projected apart or at once."""
        form = self.pick(["apart", "split", "slice", "stacked", "gathered"])
        whole = heads * size
        if form == "apart":
            return [self.heads(self.linear(self.current, self.width, whole), heads, size) for _ in range(3)]
        packed = self.linear(self.current, self.width, 3 * whole)
        if form == "split":
            return [self.heads(part, heads, size) for part in self.split(packed, [whole] * 3, self.pick([2, -1]))]
        if form == "slice":
            ends = [(0, whole), (whole, 2 * whole), (self.pick([2 * whole, -whole]), 2**31 - 1)]
            return [self.heads(self.slice(packed, *end, self.pick([2, -1])), heads, size) for end in ends]
        stacked = self.value(f"Transpose<perm=[2,0,3,1,4]>({self.reshape(packed, 0, 0, 3, heads, size)})")
        if form == "gathered":
            return [self.value(f"Gather<axis=0>({stacked}, {self.ints(i, scalar=True)})") for i in range(3)]
        return [self.axes("Squeeze", part, [0], 13) for part in self.split(stacked, [1, 1, 1], 0)]

    def repeated(self, source: str, shared: int, size: int) -> str:
        """Every head of keys or values twice, for the query heads that share it."""
        forms = ["concat"] * (shared == 1) + ["tile"] + ["expand"] * (self.opset >= 8)
        form = self.pick(forms)
        if form == "concat":
            return self.value(f"Concat<axis=1>({source}, {source})")
        apart = self.axes("Unsqueeze", source, [2], 13)
        if form == "tile":
            wide = self.value(f"Tile({apart}, {self.ints(1, 1, 2, 1, 1)})")
        else:
            wide = self.value(f"Expand({apart}, {self.ints(1, 1, 2, 1, 1)})")
        if self.open:
            turned = self.value(f"Transpose<perm=[0,3,1,2,4]>({wide})")
            return self.value(f"Transpose<perm=[0,2,1,3]>({self.reshape(turned, 0, 0, 2 * shared, size)})")
        return self.value(f"Reshape({wide}, {self.ints(0, self.pick([-1, 2 * shared]), TOKENS, size)})")

    def attention(self) -> None:
        heads, size = self.pick([2, 4]), self.pick([2, 3])
        if self.pick([False, False, True]):
            shared = heads // 2
            query = self.heads(self.linear(self.current, self.width, heads * size), heads, size)
            key, value = (
                self.repeated(
                    self.heads(self.linear(self.current, self.width, shared * size), shared, size), shared, size
                )
                for _ in range(2)
            )
        else:
            query, key, value = self.three(heads, size)
        form = self.pick(["product", "scaled query", "computed", "quotient"])
        if form == "scaled query":
            query = self.value(f"Mul({query}, {self.number(0.7)})")
        scores = self.value(f"MatMul({query}, {self.value(f'Transpose<perm=[0,1,3,2]>({key})')})")
        if form == "product":
            scores = self.value(f"Mul({scores}, {self.number(0.5)})")
        elif form == "quotient":
            scores = self.value(f"Div({scores}, {self.number(1.4)})")
        elif form == "computed":
            last = self.value(f"Gather<axis=0>({self.value(f'Shape({query})')}, {self.ints(-1, scalar=True)})")
            root = self.value(f"Sqrt({self.value(f'Cast<to=1>({last})')})")
            scores = self.value(f"Div({scores}, {root})")
        if not self.open and self.pick([False, True]):
            mask = self.weight(*self.pick([(1, 1, TOKENS, TOKENS), (TOKENS, TOKENS), (1, heads, 1, TOKENS)]))
            scores = self.value(f"Add({scores}, {mask})")
        chances = self.value(f"Softmax<axis={3 if self.opset < 13 else self.pick([3, -1])}>({scores})")
        mixed = self.value(f"Transpose<perm=[0,2,1,3]>({self.value(f'MatMul({chances}, {value})')})")
        joined = self.reshape(mixed, 0, 0, self.pick([heads * size, -1]))
        self.add(self.linear(joined, heads * size, self.width))

    def shuffled(self) -> None:
        groups = self.pick([2, self.width // 2])
        apart = self.reshape(self.current, 0, 0, groups, self.width // groups)
        turned = self.value(f"Transpose<perm=[0,1,3,2]>({apart})")
        self.current, self.given = self.reshape(turned, 0, 0, self.pick([self.width, -1])), False

    def halved(self) -> None:
        left, right = self.split(self.current, [self.width // 2, self.width - self.width // 2], self.pick([2, -1]))
        if self.pick([False, True]):
            self.current = self.value(f"Concat<axis={self.pick([2, -1])}>({right}, {left})")
        else:
            self.current, self.width = self.value(f"Mul({left}, {right})"), self.width // 2
            self.project()
        self.given = False

    def doubled(self) -> None:
        self.current = self.value(f"Concat<axis=2>({self.current}, {self.current})")
        self.width, self.given = 2 * self.width, False
        self.project()

    def picked(self) -> None:
        places = self.pick([list(range(self.width))[::-1], [0, 0, 1, -1], [2, 1, 0, 3]])
        self.current = self.value(f"Gather<axis={self.pick([2, -1])}>({self.current}, {self.ints(*places)})")
        self.width, self.given = len(places), False

    def cut(self) -> None:
        start, stop = self.pick([(0, -2), (1, self.width - 1), (-4, 2**31 - 1)])
        self.current = self.slice(self.current, start, stop, self.pick([2, -1]))
        self.width, self.given = len(range(self.width)[start:stop]), False

    def placed(self) -> None:
        shape = self.pick([(1, 1, self.width), (self.width,)] + ([] if self.open else [(1, TOKENS, self.width)]))
        self.add(self.weight(*shape))

    def excited(self) -> None:
        keep = self.pick([0, 1])
        pooled = self.mean(self.current, [1], self.pick(["ReduceMean", "ReduceMax", "ReduceSum"]), keep)
        if not keep:
            pooled = self.axes("Unsqueeze", pooled, [1], 13)
        self.current = self.value(f"Mul({self.current}, {self.activate(self.linear(pooled, self.width, self.width))})")

    def summed(self) -> None:
        """A sum over channels, of what may or may not be zero where a channel is."""
        source = self.pick([self.current, self.activate(self.current)])
        form = self.pick(["", "inverse", "shifted", "spread"])
        if form == "inverse":
            bounded = self.value(f"Tanh({source})")
            source = self.value(f"Div({self.number(1.0)}, {self.value(f'Exp({bounded})')})")
        elif form == "shifted":
            source = self.value(f"Sub({source}, {self.number(0.5)})")
        elif form == "spread" and self.opset >= 8:
            wide = self.value(f"Expand({self.number(0.5)}, {self.ints(1, 1, self.width)})")
            source = self.value(f"Add({source}, {wide})")
        total = self.mean(source, [self.pick([2, -1])], self.pick(["ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2"]))
        self.current = self.value(f"Mul({self.current}, {self.value(f'Tanh({total})')})")

    def token(self) -> None:
        """One token more, the same for every sample, and off again."""
        if self.opset < 8:
            return
        first = self.weight(1, 1, self.width)
        count = self.value(f"Gather<axis=0>({self.value(f'Shape({self.current})')}, {self.ints(0)})")
        shape = self.value(f"Concat<axis=0>({count}, {self.ints(1)}, {self.ints(self.pick([1, self.width]))})")
        longer = self.value(f"Concat<axis=1>({self.value(f'Expand({first}, {shape})')}, {self.current})")
        self.current = self.slice(longer, 1, 2**31 - 1, 1)

    def padded(self) -> None:
        pads, mode = [0, 0, 1, 0, 0, 1], ""
        if self.opset < 11:
            self.current = self.value(f"Pad<pads=[{','.join(map(str, pads))}]{mode}>({self.current})")
        else:
            self.current = self.value(f"Pad({self.current}, {self.ints(*pads)})")
        self.width, self.given = self.width + 2, False

    def image(self) -> str:
        turned = self.value(f"Transpose<perm=[0,2,1]>({self.current})")
        return self.value(f"Reshape({turned}, {self.ints(self.pick([0, -1]), self.width, 2, 3)})")

    def from_image(self, image: str) -> None:
        shape = self.pick([(0, self.width, TOKENS), (-1, self.width, TOKENS), (0, -1, TOKENS), (0, 0, -1)])
        self.current = self.value(f"Transpose<perm=[0,2,1]>({self.value(f'Reshape({image}, {self.ints(*shape)})')})")
        self.given = False

    def convolved(self) -> None:
        if self.open:
            return
        image, kernel = self.image(), self.pick([1, 3])
        pads = f"pads=[{','.join([str(kernel // 2)] * 4)}]"
        form = self.pick(["plain", "depthwise", "grouped", "deconvolved"])
        if form == "depthwise":
            made = self.value(f"Conv<{pads},group={self.width}>({image}, {self.weight(self.width, 1, kernel, kernel)})")
        elif form == "grouped":
            weight = self.weight(6, self.width // 2, kernel, kernel)
            made = self.value(f"Conv<{pads},group=2>({image}, {weight}, {self.weight(6)})")
            self.width = 6
        elif form == "deconvolved":
            made = self.value(f"ConvTranspose<{pads}>({image}, {self.weight(self.width, 4, kernel, kernel)})")
            self.width = 4
        else:
            made = self.value(f"Conv<{pads}>({image}, {self.weight(4, self.width, kernel, kernel)}, {self.weight(4)})")
            self.width = 4
        self.from_image(self.activate(made))

    def grouped_norm(self) -> None:
        if self.open:
            return
        forms = ["instance", "folded"] + ["operator"] * (self.opset >= 21)
        image, form, groups = self.image(), self.pick(forms), self.width // 2
        if form == "instance":
            scales = f"{self.weight(self.width)}, {self.weight(self.width)}"
            made = self.value(f"InstanceNormalization({image}, {scales})")
        elif form == "folded":
            flat = self.value(f"Reshape({image}, {self.ints(0, groups, -1)})")
            scales = f"{self.weight(groups)}, {self.weight(groups)}"
            normal = self.value(f"InstanceNormalization({flat}, {scales})")
            shape = self.value(f"Shape({image})") if self.pick([0, 1]) else self.ints(0, self.width, 2, 3)
            made = self.value(f"Reshape({normal}, {shape})")
            made = self.value(f"Mul({made}, {self.weight(self.width, 1, 1)})")
        else:
            scales = f"{self.weight(self.width)}, {self.weight(self.width)}"
            made = self.value(f"GroupNormalization<num_groups={groups}>({image}, {scales})")
        self.from_image(made)

    def chosen(self) -> None:
        """One of two layers, in the branches of an If."""
        mark, before, self.inside = len(self.lines), (self.current, self.width), True
        texts = list[tuple[str, str]]()
        for _ in range(2):
            made = self.activate(self.linear(self.current, self.width, self.width))
            texts.append((made, " ".join(self.lines[mark:])))
            del self.lines[mark:]
            self.current, self.width = before
        self.inside = False
        small = self.value(f"ReduceMean<keepdims=0>({self.current})")
        condition = self.value(f"Less({small}, {self.number(0.0)})")
        (yes, then), (no, other) = texts
        branches = f"then_branch = a () => ({yes}) {{ {then} }}, else_branch = b () => ({no}) {{ {other} }}"
        self.current, self.given = self.value(f"If({condition}) <{branches}>"), False

    def finish(self) -> ir.Model:
        head = self.pick(["tokens", "first", "pooled"] + ["flat"] * (not self.open))
        last = self.current
        if head == "tokens":
            self.lines.append(f"y = MatMul({last}, {self.weight(self.width, 5)})")
        else:
            columns = self.width
            if head == "first":
                flat = self.value(f"Gather<axis=1>({last}, {self.ints(0, scalar=True)})")
            elif head == "pooled":
                flat = self.mean(last, [1], keep=0)
            else:
                flat, columns = self.value(f"Flatten({last})"), TOKENS * self.width
                if self.pick([False, True]):
                    flat = self.value(f"Reshape({last}, {self.ints(self.pick([0, -1]), TOKENS * self.width)})")
            self.lines.append(f"y = Gemm({flat}, {self.weight(columns, 5)}, {self.weight(5)})")
        tokens = "T" if self.open else TOKENS
        signature = f"(float[N,{tokens},8] x) => (float[{f'N,{tokens}' if head == 'tokens' else 'N'},5] y)"
        return self.model(signature)

    def model(self, signature: str) -> ir.Model:
        kinds = {"float32": "float", "int64": "int64", "int8": "int8"}
        declared = [f"{kinds[a.dtype.name]}[{','.join(map(str, a.shape))}] {name}" for name, a in self.arrays.items()]
        text = f'<ir_version: 8, opset_import: ["" : {self.opset}]>\nmain {signature} <{", ".join(declared)}> {{\n'
        proto = onnx.parser.parse_model(text + "\n".join(self.lines) + "\n}")
        proto.graph.initializer.extend(ir.to_proto(ir.tensor(array, name=name)) for name, array in self.arrays.items())
        return ir.from_proto(proto)


BLOCKS = (
    "project", "activated", "mlp", "gated", "norm", "attention", "attention", "shuffled", "halved", "doubled", "picked",
    "cut", "placed", "excited", "summed", "token", "padded", "convolved", "grouped_norm", "chosen",
)  # fmt: skip


@st.composite
def transformers(draw: st.DrawFn) -> ir.Model:
    """A network of up to five blocks."""
    opset = draw(st.sampled_from(OPSETS))
    drawing = Transformer(lambda options: draw(st.sampled_from(options)), opset, open_tokens=draw(st.booleans()))
    for name in draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5)):
        if drawing.width % 2 == 0 and drawing.width >= 4:
            getattr(drawing, name)()
        else:
            drawing.project()
    return drawing.finish()
