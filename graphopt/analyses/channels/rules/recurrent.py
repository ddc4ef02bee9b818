"""How channels pass through recurrent layers: tables `RECURRENT_RULES` and `RECURRENT_CONTRIB_RULES`.

operator              what is tied                                                                 what is pinned
LSTM, GRU, RNN,       hidden unit ~ its row of every gate in W, R, B and peepholes ~ its column    directions
  DynamicQuantizeLSTM   of R ~ its state, in both directions; in ~ W in; batch, time

G gates, H hidden units, D directions:

    X [T, N, I]   W [D, G H, I]   R [D, G H, H]   B [D, 2 G H]   P [D, 3 H]   states [D, N, H]   Y [T, D, N, H]

and with `layout=1`, X [N, T, I], states [N, D, H], Y [N, T, D, H]. A dynamically quantized LSTM holds W [D, I, G H] and
R [D, H, G H].
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels.node_view import NodeView
from graphopt.analyses.channels.rules.computing import Rule

__all__ = ["RECURRENT_CONTRIB_RULES", "RECURRENT_RULES"]


def _recurrent(view: NodeView) -> None:
    quantized = view.node.op_type == "DynamicQuantizeLSTM"
    source, weight, recurrence = view.input(0), view.input(1), view.input(2)
    made, read = (2, 1) if quantized else (1, 2)
    units, rows = view.atoms(recurrence, read), view.atoms(recurrence, made)
    if source is None or weight is None or recurrence is None or units is None or rows is None or not len(units):
        return
    parameters = [(weight, made), (recurrence, made), (view.input(3), 1), (view.input(7), 1)]
    if quantized:  # scales and zero points of one value a direction stay
        parameters += [(value, 1) for i in (8, 9, 10, 11) if view.rank(value := view.input(i)) == 2]
    present = [(value, axis) for value, axis in parameters if value is not None]
    atoms = [view.atoms(value, axis) for value, axis in present]
    if any(own is None or len(own) % len(units) for own in atoms):
        return
    for matrix in (weight, recurrence):
        view.role(matrix, made, "output")
        view.role(matrix, read, "input")
    for (value, axis), own in zip(present, atoms, strict=True):
        if own is not None:
            view.tie(np.tile(units, len(own) // len(units)), own)
            view.settle(value, axis)
    view.settle(recurrence, read)
    view.call(units, "hidden units")
    view.link(source, 2, weight, read)
    for value in (view.input(5), view.input(6), *view.node.outputs):
        view.link(recurrence, read, value, -1)
    view.state_sizes("hidden_size", (len(units),), [(0, view.span(recurrence, read))], scalar=True)
    _batch_and_time(view, source)


def _batch_and_time(view: NodeView, source: ir.Value) -> None:
    """Axes of the input that are those of outputs and states."""
    first = bool(view.node.attributes.get_int("layout", 0))
    time, batch = (1, 0) if first else (0, 1)
    states = [view.input(5), view.input(6), *view.node.outputs[1:]]
    for value, axis in ((view.node.outputs[0], 0 if first else 2), (view.input(4), 0), *((s, batch) for s in states)):
        view.link(source, batch, value, axis)
    view.link(source, time, view.node.outputs[0], time)


RECURRENT_RULES: dict[str, Rule] = dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent)
RECURRENT_CONTRIB_RULES: dict[tuple[str, str], Rule] = {("com.microsoft", "DynamicQuantizeLSTM"): _recurrent}
