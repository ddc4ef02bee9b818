"""INT8 on models made hard on purpose: GRAPHOPT_ZOO=... python benchmarks/quant_hard.py [CASE ...] [--limit N].

Each hard model computes what the trained one does, but is written down so that one grid a tensor serves it badly:

    cifar10_resnet20   every channel that may be scaled is, by a random power of two between 1/16 and 16: between two
                       convolutions, across batch norms, and all members of a residual group alike
    minilm             one channel behind every LayerNorm is 50 times as large; the layers that read it divide it out

Each is quantized with every accuracy helper by itself, with all and with none, beside the model as it was trained.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import tables
from zoo_quant import load_zoo

import graphopt
from graphopt.analyses import SHAPES
from graphopt.model_io import load_model, save_model
from graphopt.pass_base import Context
from graphopt.targets import Target
from graphopt_passes.fold.rewiring import FreshNames
from graphopt_passes.quant.adjust.components import components, find_scales
from graphopt_passes.quant.adjust.constants import scale_constant
from graphopt_passes.quant.sites import tensor_of

OFF = "equalize=false smooth=false bias_correction=false rounding=nearest outliers=0"
HELPERS = {
    "none": OFF,
    "equalize": OFF.replace("equalize=false", "equalize=true"),
    "smooth": OFF.replace("smooth=false", "smooth=true"),
    "bias_correction": OFF.replace("bias_correction=false", "bias_correction=true"),
    "rounding=gptq": OFF.replace("nearest", "gptq"),
    "rounding=adaround": OFF.replace("nearest", "adaround"),
    "outliers=0.01": OFF.replace("outliers=0", "outliers=0.01"),
    "defaults": "",
}


def rescale_channels(model: ir.Model, seed: int = 0, octaves: int = 4) -> int:
    """Scale channels by random powers of two, in place; the model computes the same.

    Args:
        model: A float model.
        seed: Of the random numbers.
        octaves: Factors lie between 2 to minus this and 2 to this.

    Returns:
        How many channels were scaled.
    """
    rng, names = np.random.default_rng(seed), FreshNames(model)
    scales = find_scales(model, Context(model, Target(name="ort")).fact(SHAPES))
    scaled = 0
    for component in components(scales):
        factors = np.append(2.0 ** rng.integers(-octaves, octaves + 1, len(component.roots)), 1.0)
        for term in dict.fromkeys((*component.makers, *component.readers)):
            up, down = (
                1.0 if atoms is None else factors[component.slots(scales, atoms)] for atoms in (term.made, term.read)
            )
            scale_constant(term.node, term.index, np.asarray(up / down), names)
        scaled += len(component.roots)
    return scaled


def inflate_channel(model: ir.Model, factor: float = 50.0, channel: int = 7) -> int:
    """Make one channel behind every LayerNormalization larger, in place; the model computes the same.

    MatMuls that read it get smaller weights; whatever else reads it, a residual connection, gets a Mul.

    Returns:
        How many normalizations were changed.
    """
    names, changed = FreshNames(model), 0
    for node in [node for node in model.graph if node.op_type == "LayerNormalization"]:
        output, tensor = node.outputs[0], tensor_of(node.inputs[1])
        if tensor is None or output.is_graph_output():
            continue
        factors = np.ones(tensor.size, np.float32)
        factors[channel] = factor
        for index in (1, 2):
            scale_constant(node, index, factors, names)
        others: list[tuple[ir.Node, int]] = []
        for user, index in tuple(output.uses()):
            if user.op_type == "MatMul" and index == 0 and tensor_of(user.inputs[1]) is not None:
                scale_constant(user, 1, 1 / factors[:, None], names)
            else:
                others.append((user, index))
        if others:
            vector = names.make(f"{output.name}_deflate")
            held = ir.Value(name=vector, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(factors.shape))
            held.const_value = ir.Tensor(1 / factors, name=vector)
            model.graph.register_initializer(held)
            restored = ir.Value(name=names.make(f"{output.name}_deflated"), type=output.type, shape=output.shape)
            back = ir.node("Mul", [output, held], outputs=[restored], name=restored.name)
            model.graph.insert_after(node, back)
            for user, index in others:
                user.replace_input_with(index, restored)
        changed += 1
    return changed


CASES: dict[str, tuple[str, Callable[[ir.Model], int]]] = {
    "cifar10_resnet20": ("fold{batchnorm=false}", rescale_channels),
    "minilm": ("fold", inflate_channel),
}


def build(case: str, source: Path, target: Path) -> int:
    """Write the hard variant of a zoo model; returns how much of it was changed."""
    passes, harden = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        graphopt.optimize(str(source), passes, out=f"{folder}/out", check="none")
        model = load_model(Path(f"{folder}/out/model.onnx"))
        changed = harden(model)
        save_model(model, target)
    return changed


def main() -> None:
    """Quantize and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--limit", type=int, help="score the first N samples only")
    parser.add_argument("--helpers", default=",".join(HELPERS), help="which rows, by name")
    parser.add_argument("--options", default="", help="further options of quant, such as mode=static")
    parser.add_argument("--name", default="quant_hard")
    options = parser.parse_args()
    zoo, rows = load_zoo(), list[tuple[object, ...]]()
    for case in options.cases or sorted(CASES):
        with tempfile.TemporaryDirectory() as folder:
            zoo.export(case, folder, limit=8)
            changed = build(case, Path(folder) / "model.onnx", Path(folder) / "hard.onnx")
            for variant, file in (("as trained", "model.onnx"), (f"hard ({changed} changed)", "hard.onnx")):
                exact = zoo.score(case, f"{folder}/{file}", limit=options.limit)["value"]
                for helper in options.helpers.split(","):
                    text = f"fold,quant{{{' '.join(filter(None, (HELPERS[helper], options.options)))}}}"
                    start = time.perf_counter()
                    result = graphopt.optimize(
                        f"{folder}/{file}",
                        text.replace("{}", ""),
                        calibration=f"{folder}/calib.npz",
                        out=f"{folder}/out",
                        overwrite=True,
                        check="none",
                    )
                    took = time.perf_counter() - start
                    got = zoo.score(case, f"{folder}/out/model.onnx", limit=options.limit)["value"]
                    metrics = result.report.steps[-1].metrics
                    figures = metrics.get("output_sqnr_db", ""), metrics.get("layers_static", ""), f"{took:.0f}"
                    rows.append((case, variant, helper, f"{exact:.4g}", f"{got:.4g}", *figures))
                    print(*rows[-1], flush=True)
    head = ("case", "written", "helpers", "float", "result", "dB at the output", "static layers", "seconds")
    tables.write(options.name, "Hard models in int8, one accuracy helper at a time", head, rows)


if __name__ == "__main__":
    main()
