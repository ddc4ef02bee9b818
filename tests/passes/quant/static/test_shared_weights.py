"""Random models of layers that share weights and vectors, with branches and loops: all stay close, and all load."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantized_models import actions, samples
from small_models import build, context

from graphopt.analyses.names import Names
from graphopt.reference import Reference
from graphopt.runner import run_pass
from graphopt.targets import IntegerRules, Target
from graphopt_passes.quant import Quant
from graphopt_passes.quant.sites import find_sites

SIGNATURE = "(float[4,32] x, bool c, bool d, int64 n) => (float[4,32] y)"
WEIGHTS = {"w0": (32, 32), "w1": (32, 32), "w2": (32, 32), "w3": (4, 4), "b0": (32,), "b1": (1, 32), "b2": (4, 32)}
PLAIN = (
    "[NAME] NAME = MatMul(FROM, WEIGHT)",
    "[NAME] NAMEh = MatMul(FROM, WEIGHT)  NAME = Add(NAMEh, b0)",
    "[NAME] NAME = Gemm<alpha = 0.5, beta = 2.0>(FROM, WEIGHT, BIAS)",
    "[NAME] NAME = Gemm<transB = 1>(FROM, WEIGHT, BIAS)",
    "[NAME] NAME = MatMul(w3, FROM)",
    "NAME = Relu(FROM)",
    "NAME = Tanh(FROM)",
    "NAME = Add(FROM, EARLIER)",
)


class _Writer:
    """Writes the body of a random model."""

    def __init__(self, seed: int) -> None:
        self.rng, self.count = np.random.default_rng(seed), 0

    def fresh(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def lines(self, source: str, depth: int = 0) -> tuple[str, str]:
        """Some nodes behind a value, and what the last one makes."""
        written, made = list[str](), [source]
        for _ in range(int(self.rng.integers(2, 5))):
            kind, name = self.rng.random(), self.fresh()
            write = self._branches if kind < 0.18 and depth < 2 else self._loop if kind < 0.28 and depth < 2 else None
            written.append(write(name, made, depth) if write else self._plain(name, made))
            made.append(name)
        return "\n".join(written), made[-1]

    def _plain(self, name: str, made: list[str]) -> str:
        line = str(self.rng.choice(PLAIN))
        for word, options in (("EARLIER", made), ("WEIGHT", ["w0", "w1", "w2"]), ("BIAS", ["b0", "b1", "b2"])):
            line = line.replace(word, str(self.rng.choice(options)))
        return line.replace("NAME", name).replace("FROM", made[-1])

    def _branches(self, name: str, made: list[str], depth: int) -> str:
        (one, first), (two, second) = self.lines(made[-1], depth + 1), self.lines(str(self.rng.choice(made)), depth + 1)
        out = self.fresh()  # both branches call their result so
        return f"""{name} = If({self.rng.choice(["c", "d"])}) <
          then_branch = yes{name} () => (float[4,32] {out}) {{ {one} {out} = Identity({first}) }},
          else_branch = no{name} () => (float[4,32] {out}) {{ {two} {out} = Neg({second}) }}>"""

    def _loop(self, name: str, made: list[str], depth: int) -> str:
        state, turn, go, on, out = (self.fresh() for _ in range(5))
        inner, last = self.lines(state, depth + 1)
        head = f"(int64 {turn}, bool {go}, float[4,32] {state}) => (bool {on}, float[4,32] {out})"
        return f"""{name} = Loop(n, yes, {made[-1]}) <
          body = turn{name} {head} {{ {on} = Identity({go}) {inner} {out} = Tanh({last}) }}>"""


def random_model(seed: int) -> ir.Model:
    text, last = _Writer(seed).lines("x")
    model = build(SIGNATURE, f"yes = Constant<value = bool {{1}}>()  {text}  y = Identity({last})", WEIGHTS)
    for name in ("w0", "w1", "w2"):  # small enough that loops do not magnify what is rounded
        for graph in model.graphs():
            value = graph.initializers.get(name)
            if value is not None and value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy() / 6, name=name)
    return model


def distance(original: ir.Model, model: ir.Model, *, optimize: bool = True) -> float:
    """Signal to noise in dB over four random inputs."""
    left, right, signal, noise = Reference(original), Reference(model, optimize=optimize), 0.0, 1e-30
    for feed in samples(original, 4, seed=9).feeds():
        expected, got = left.run(feed)["y"], right.run(feed)["y"]
        signal, noise = signal + float(np.square(expected).sum()), noise + float(np.square(expected - got).sum())
    return 10 * np.log10(signal / noise)


OPTIONS: tuple[dict[str, object], ...] = (
    {},
    {"mode": "static", "min_sqnr": -99.0, "min_output_sqnr": -99.0},
    {"per_channel": False},
    {"skip": True, "min_output_sqnr": -99.0},
    {"calibrator": "auto", "rounding": "gptq"},
)


@pytest.mark.parametrize("seed", range(10))
def test_random_models_stay_close(seed: int) -> None:
    model, original = random_model(seed), random_model(seed)
    options, sites = dict(OPTIONS[seed % len(OPTIONS)]), find_sites(model)[0]
    if options.pop("skip", False):
        options["skip"] = tuple(site.name for site in sites[::3])  # what shares a weight with these stays float too
    result = run_pass(Quant(**options), context(model, calibration=samples(model, 8))).result  # type: ignore[arg-type]
    assert {site.name for site in sites} <= set(actions(result))
    assert distance(original, model) > 20
    assert distance(original, model, optimize=False) > 20
    if result.modified:
        assert not [value for value in Names(model).renamed if not value.is_initializer()]


@pytest.mark.parametrize("seed", range(10, 14))
def test_random_models_stay_close_for_a_target_of_static_integers(seed: int) -> None:
    model, original = random_model(seed), random_model(seed)
    rules = IntegerRules(static_only=True, activation="int8", symmetric_activations=True)
    ctx = context(model, calibration=samples(model, 8), target=Target(name="unit", integers=rules))
    kinds = {action.partition(":")[0] for action in actions(run_pass(Quant(), ctx).result).values()}
    assert not kinds & {"int8, input ranges found on every run", "weights in int8, arithmetic in float"}
    assert distance(original, model) > 20
