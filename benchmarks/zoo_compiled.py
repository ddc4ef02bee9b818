"""Real trained models compiled: GRAPHOPT_ZOO=... python benchmarks/zoo_compiled.py [CASE ...] [--target arm --limit 8].

Every model of the zoo is compiled for a target and scored on its labelled data as it is in ONNX Runtime: the same
decimals are expected of both. Beside it stand what runs its nodes, the largest difference of outputs on the first
samples, and how long compiling took. Under an emulator take a few samples; its time says nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tables
from zoo_quant import load_zoo

from graphopt.backend_base import Backend, BuildOptions
from graphopt.errors import GraphoptError
from graphopt.model_io import ShapeBinding, load_model
from graphopt.plugins import load_plugins
from graphopt.targets import Target
from graphopt_backends._plan import Plan, read_plan

_BATCHES = 8


class Compiled(onnxruntime.InferenceSession):
    """A bundle with the face of a session: batches of one."""

    def __init__(self, backend: Backend, target: Target, folder: Path, plan: Plan) -> None:
        self._run, self._plan = backend.load(folder, target, 1), plan

    def get_inputs(self) -> list[Any]:
        """Names and fixed shapes."""
        return [_Port(spec.name, spec.shape) for spec in self._plan.inputs]

    def get_outputs(self) -> list[Any]:
        """Names and fixed shapes."""
        return [_Port(spec.name, spec.shape) for spec in self._plan.outputs]

    def run(self, output_names: Any, input_feed: Any, run_options: Any = None) -> Any:
        """Run once."""
        del run_options
        made = self._run(input_feed)
        return [made[name] for name in output_names or [port.name for port in self.get_outputs()]]


class _Port:
    def __init__(self, name: str, shape: tuple[int, ...] | None) -> None:
        self.name, self.shape = name, list(shape or ())


def main() -> None:
    """Compile, score, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--target", default="x86")
    parser.add_argument("--model", help="a file in place of the case's model; {case} stands for its name")
    parser.add_argument("--limit", type=int, help="score the first N samples only")
    parser.add_argument("--name", default="zoo_compiled")
    options = parser.parse_args()
    zoo, registry, rows = load_zoo(), load_plugins(), []
    target = registry.targets.resolve(options.target)
    backend = registry.backends[target.backend or ""]
    for name in options.cases or sorted(zoo.cases()):
        try:
            row = _row(zoo, name, backend, target, options)
        except GraphoptError as e:
            row = (str(e)[:200], "", "", "", "", "")
        rows.append((name, *row))
        print(*rows[-1], flush=True)
    head = ("case", "runners", "max diff", "metric", "ONNX Runtime", "compiled", "seconds to compile")
    notes = f"Target `{target}`, {backend.how(target)}. `max diff`: largest difference over the largest output."
    tables.write(options.name, f"Real models compiled for {target}", head, rows, notes)


def _row(zoo: Any, name: str, backend: Backend, target: Target, options: argparse.Namespace) -> tuple[object, ...]:
    case = zoo.cases()[name]
    data = zoo.load(case, None, options.limit)
    source = Path(options.model.format(case=name) if options.model else case.model)
    model = load_model(source)
    with tempfile.TemporaryDirectory() as scratch:
        folder, start = Path(scratch), time.perf_counter()
        binding = ShapeBinding(shapes=_shapes(zoo, case, source, data))
        build = backend.build(
            model,
            target,
            folder,
            BuildOptions(binding=binding, fallback="ort", cache=Path.home() / ".cache" / "graphopt"),
        )
        took, plan = time.perf_counter() - start, read_plan(folder)
        compiled, plain = Compiled(backend, target, folder, plan), zoo.session(source)
        diff = _difference(zoo, case, compiled, plain, data)
        scores = [zoo.score(name, session, limit=options.limit) for session in (plain, compiled)]
    runners = [f"{build.facts.get('steps', 0)} steps of kernels"]
    runners += [f"{build.facts[key]} {key}" for key in sorted(build.facts) if key.startswith("nodes run by")]
    values = (f"{score['value']:.4g}" for score in scores)
    return "; ".join(runners), f"{diff:.1e}", scores[0]["metric"], *values, f"{took:.1f}"


def _shapes(zoo: Any, case: Any, source: Path, data: Any) -> dict[str, tuple[int, ...]]:
    """Fixed shapes of one sample."""
    ports = {port.name: port.shape for port in zoo.session(source).get_inputs()}
    found = {key: (1, *array.shape[1:]) for key, array in data.inputs.items() if array.ndim == len(ports.get(key, ()))}
    found |= {key: array.shape[1:] for key, array in data.inputs.items() if array.ndim == len(ports.get(key, ())) + 1}
    return found | {key: tuple(state["shape"]) for key, state in case.state.items()}


def _difference(zoo: Any, case: Any, compiled: Compiled, plain: Any, data: Any) -> float:
    """On the first samples, both fed with what the original makes of them."""
    first = {key: array[:_BATCHES] for key, array in data.inputs.items()}
    if case.state:
        feeds = [feed for feed, _ in zoo.trace(case, plain, first)]
    else:
        feeds = [feed for _, feed in zoo._feeds(compiled, first, 1)]  # noqa: SLF001
    worst = 0.0
    for feed in feeds:
        for mine, theirs in zip(compiled.run(None, feed), plain.run(None, feed), strict=True):
            largest = float(np.abs(theirs).max(initial=0)) or 1.0
            worst = max(worst, float(np.abs(mine.astype(np.float64) - theirs).max(initial=0)) / largest)
    return worst


if __name__ == "__main__":
    main()
