"""Write a plan into a model, for real or as a float32 model that rounds exactly where the real one would.

ONNX Runtime's CPU kernels compute most fp16 operators in float32 and leave the rounding between them out, so that an
overflow that a GPU would meet stays hidden. The simulation rounds every value by a pair of casts of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.opset import opset_version
from graphopt_passes._own_constants import constant_tensor
from graphopt_passes.fold.rewiring import LARGE
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.floats._rounding import narrowed
from graphopt_passes.quant.floats.origins import MASK_LIMIT
from graphopt_passes.quant.floats.plan import Plan, Survey
from graphopt_passes.quant.floats.ports import BLIND, Ports
from graphopt_passes.quant.sites import keyed_nodes

__all__ = ["insert_behind", "narrow_tensor", "write_plan"]

_HALF, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
_CLIP_INPUTS_SINCE = 11
_WORTH = 64  # elements of a constant from which it matters whether it is stored twice


def write_plan(survey: Survey, plan: Plan, *, simulate: bool = False) -> ir.Model:
    """Make a copy of the surveyed model with the plan's nodes in fp16.

    Args:
        survey: The model and what is known of it; the model does not change.
        plan: What becomes fp16.
        simulate: Compute in float32 and round every value that would be fp16.
    """
    model, originals = survey.model.clone(), dict(survey.nodes)
    nodes = keyed_nodes(model)
    writer = _Writer(model, {nodes[key]: ports for key, ports in plan.narrow.items()}, simulate=simulate)
    writer.clipped = {nodes[key].outputs[index] for key, index in plan.clipped}
    writer.widening = [nodes[key].outputs[0] for key in survey.widening]
    writer.exact = {nodes[key] for key in nodes if key in survey.left or not plan.store}
    for key in plan.narrow:
        writer.narrow_node(nodes[key], survey.limit(originals[key]))
    for key, ports in plan.narrow.items():
        for index in ports.outputs:
            writer.hand_on(nodes[key].outputs[index])
    writer.settle_constants()
    writer.drop_unread()
    return model


def narrow_tensor(tensor: ir.TensorProtocol, dtype: ir.DataType, limit: float = math.inf) -> ir.TensorProtocol:
    """A tensor in a narrower type; that of a large one is computed whenever it is read, so that none is kept."""

    def make() -> ir.Tensor:
        return ir.Tensor(narrowed(tensor.numpy(), dtype, limit))

    if tensor.nbytes > LARGE or isinstance(tensor, ir.ExternalTensor):
        return ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()))
    return make()


def insert_behind(value: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Insert nodes as soon as a value is known, in its own graph."""
    producer, graph = value.producer(), value.graph
    if producer is not None and isinstance(producer.graph, ir.Graph):
        producer.graph.insert_after(producer, nodes)
    elif not isinstance(graph, ir.Graph):
        raise TypeError(f"value {value.name!r} is in no graph")
    elif len(graph):
        graph.insert_before(graph[0], nodes)
    else:
        graph.extend(nodes)


class _Writer:
    """Edits one copy of a model. Types of new values are left to shape inference, as in `Builder`.

    Args:
        model: The copy.
        ports: What becomes narrow at its nodes.
        simulate: Round instead of changing types.
    """

    def __init__(self, model: ir.Model, ports: dict[ir.Node, Ports], *, simulate: bool) -> None:
        self.builder = Builder(model)
        self.opset = opset_version(model)
        self.ports = ports
        self.simulate = simulate
        self.clipped: set[ir.Value] = set()  # values to clip before they are cast
        self.widening: list[ir.Value] = []  # values that were fp16 before a Cast of the model
        self.exact: set[ir.Node] = set()  # nodes that read float32 weights as they were
        self._narrow = {node.outputs[i] for node, found in ports.items() for i in found.outputs}
        self._casts: dict[ir.Value, ir.Value] = {}
        self._constants: dict[tuple[ir.Value, float], ir.Value] = {}

    def narrow_node(self, node: ir.Node, limit: float) -> None:
        """Let a node read narrow values and say that it makes such."""
        for index in self.ports[node].inputs:
            value = node.inputs[index]
            if value is None or value in self._narrow:
                continue
            tensor = constant_tensor(value)
            fed = self._cast(value) if tensor is None else self._constant(value, tensor, limit)
            node.replace_input_with(index, fed)
        if not self.ports[node].outputs:
            return
        if node.op_type == "ConstantOfShape":
            self._fill(node, limit)
        if not self.simulate:
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", int(_HALF))
            for index in self.ports[node].outputs:
                if node.outputs[index].type is not None:
                    node.outputs[index].type = ir.TensorType(_HALF)

    def hand_on(self, output: ir.Value) -> None:
        """Give float32 to the readers of a narrow value that need it, and to everyone outside."""
        reads = [(user, i) for user, i in output.uses() if self.simulate or not self._is_narrow(user, i)]
        if not reads and not output.is_graph_output():
            return
        name = output.name or "value"
        returned = output.is_graph_output()
        takes_name = returned or self.simulate
        described = ir.TensorType(_FLOAT) if returned and output.type is not None else None
        wide = ir.Value(name=None, type=described, shape=output.shape if returned else None)
        last = ir.node("Cast", [output], {"to": int(_FLOAT)}, outputs=[wide])
        chain = [last]
        if self.simulate:
            first = self._cast_node(output, _HALF, f"{name}_fp16")
            last.replace_input_with(0, first.outputs[0])
            chain = [first, last]
        insert_behind(output, chain)
        for user, index in reads:
            user.replace_input_with(index, wide)
        if returned:
            self._return_instead(output, wide)
        if takes_name:
            output.name = self.builder.name(f"{name}_narrow")
            wide.metadata_props.update(output.metadata_props)
            wide.doc_string = output.doc_string
        wide.name = name if takes_name else self.builder.name(f"{name}_fp32")
        last.name = self.builder.name(f"{name}_fp32") if takes_name else wide.name

    def settle_constants(self) -> None:
        """Store each constant once: in fp16, or in float32 where a node is to read it as it was."""
        for (value, _), narrow in self._constants.items():
            users = [user for user in value.consumers() if user.op_type != "Cast"]
            if (users or value.is_graph_output()) and self._size(value) >= _WORTH:
                self._store_once(value, narrow, users)
            if value.uses() or value.is_graph_output():
                continue
            self.builder.discard(value)
            graph, name = narrow.graph, value.name or ""
            free = isinstance(graph, ir.Graph) and value.producer() is None and name not in graph.initializers
            if free and not self.simulate:
                narrow.name = name

    def drop_unread(self) -> None:
        """Remove casts from fp16 to float32 that nobody reads any more."""
        for value in self.widening:
            node = value.producer()
            if (
                node is not None
                and isinstance(node.graph, ir.Graph)
                and not value.uses()
                and not value.is_graph_output()
            ):
                node.graph.remove(node, safe=True)

    def _store_once(self, value: ir.Value, narrow: ir.Value, users: Sequence[ir.Node]) -> None:
        if value.is_graph_output() or any(user in self.exact for user in users):
            narrow.replace_all_uses_with(self._cast(value))
            self.builder.discard(narrow)
        elif self.simulate:
            value.replace_all_uses_with(narrow)
        else:
            wide = self._cast_node(narrow, _FLOAT, f"{value.name}_fp32")
            insert_behind(narrow, [wide])
            value.replace_all_uses_with(wide.outputs[0])

    @staticmethod
    def _size(value: ir.Value) -> int:
        tensor = constant_tensor(value)
        return 0 if tensor is None else int(tensor.size)

    def _is_narrow(self, user: ir.Node, index: int) -> bool:
        return user.op_type in BLIND or (user in self.ports and index in self.ports[user].inputs)

    def _cast(self, value: ir.Value) -> ir.Value:
        """A float32 value in fp16, cast once, right where it is made."""
        if value not in self._casts:
            producer = value.producer()
            source = producer.inputs[0] if producer is not None and value in self.widening else None
            if source is not None and not self.simulate:
                self._casts[value] = source
                return source
            chain = [self._clip(value)] if value in self.clipped else []
            chain.append(self._cast_node(chain[-1].outputs[0] if chain else value, _HALF, f"{value.name}_fp16"))
            if self.simulate:
                chain.append(self._cast_node(chain[-1].outputs[0], _FLOAT, f"{value.name}_rounded"))
            insert_behind(value, chain)
            self._casts[value] = chain[-1].outputs[0]
        return self._casts[value]

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol, limit: float) -> ir.Value:
        key = (value, limit)
        if key not in self._constants:
            graph, name = value.graph, self.builder.name(f"{value.name}_fp16")
            if not isinstance(graph, ir.Graph):
                raise TypeError(f"constant {value.name!r} is in no graph")
            half = narrow_tensor(tensor, _HALF, limit)
            half.name = name
            stored = ir.Value(name=name, type=ir.TensorType(_HALF), shape=value.shape, const_value=half)
            stored.doc_string = value.doc_string
            stored.metadata_props.update(value.metadata_props)
            graph.register_initializer(stored)
            if self.simulate:
                wide = self._cast_node(stored, _FLOAT, f"{name}_wide")
                insert_behind(stored, [wide])
                stored = wide.outputs[0]
            self._constants[key] = stored
        return self._constants[key]

    def _clip(self, value: ir.Value) -> ir.Node:
        name, ends = self.builder.name(f"{value.name}_clipped"), (-MASK_LIMIT, MASK_LIMIT)
        output = ir.Value(name=name)
        if self.opset < _CLIP_INPUTS_SINCE:
            return ir.node("Clip", [value], {"min": ends[0], "max": ends[1]}, outputs=[output], name=name)
        bounds = [self.builder.scalar("mask_limit", np.array(end, np.float32)) for end in ends]
        return ir.node("Clip", [value, *bounds], outputs=[output], name=name)

    def _cast_node(self, value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
        return self.builder.node("Cast", [value], name, {"to": int(to)})

    def _fill(self, node: ir.Node, limit: float) -> None:
        attribute = node.attributes.get("value")
        array = np.zeros(1, np.float32) if attribute is None else attribute.as_tensor().numpy()
        array = narrowed(array, _HALF, limit)
        tensor = ir.tensor(array.astype(np.float32) if self.simulate else array)
        node.attributes["value"] = ir.AttrTensor("value", tensor)

    @staticmethod
    def _return_instead(old: ir.Value, new: ir.Value) -> None:
        graph = old.graph
        outputs: Collection[ir.Value] = graph.outputs if isinstance(graph, ir.Graph) else ()
        for index, value in enumerate(tuple(outputs)):
            if value is old and isinstance(graph, ir.Graph):
                graph.outputs[index] = new
