"""Other pruners on the zoo's CIFAR ResNets, brought to a wanted number of multiply-accumulates.

onnxsim prunes the ONNX file. Torch-Pruning needs PyTorch: the network (He et al. 2016, projection-free shortcuts of
option A, as in akamaster/pytorch_resnet_cifar10) is rebuilt here and takes the file's initializers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphopt.analyses import COST
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.reference import Reference
from graphopt.targets import Target

__all__ = ["macs", "onnxsim_pruned", "rebuilt", "torch_pruned"]

_STEPS = 12
_BATCH = 250


def macs(path: Path) -> int:
    """Multiply-accumulates of a model for one sample."""
    model = load_model(path)
    return Context(model, Target(name="ort")).fact(COST).macs


def _sought(make: Callable[[float], int], target: int) -> float:
    """The fraction at which `make` comes nearest to `target`; every layer is rounded, so that steps remain."""
    low, high, best = 0.0, 1.0, (float("inf"), 0.0)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        got = make(middle)
        best = min(best, (abs(got - target), middle))
        low, high = (middle, high) if got > target else (low, middle)
    return best[1]


def onnxsim_pruned(source: Path, out: Path, criterion: str, target: int, samples: np.ndarray) -> None:
    """Prune with onnxsim: `l1` or `l2` by weights alone, `wanda` with samples.

    Args:
        source: The model.
        out: Where the result goes.
        criterion: How channels are judged.
        target: Multiply-accumulates to come down to.
        samples: Calibration images.
    """
    import onnxsim

    simplified, ok = onnxsim.simplify(onnx.load(source))  # folds batch norms, which its pruning expects
    if not ok:
        raise RuntimeError("onnxsim could not simplify the model")
    text = simplified.SerializeToString()

    def by_weights(fraction: float) -> int:
        norm = "l1" if criterion == "l1" else "l2"
        pruned = onnxsim.apply_structured_pruning(onnx.load_from_string(text), fraction, norm)
        onnx.save(pruned, out)
        return macs(out)

    fraction = _sought(by_weights, target)
    by_weights(fraction)
    if criterion == "wanda":
        name = simplified.graph.input[0].name
        batches = [{name: samples[i : i + _BATCH]} for i in range(0, len(samples), _BATCH)]
        model = onnx.load_from_string(text)
        onnx.save(onnxsim.apply_structured_wanda_pruning(model, batches, sparsity=fraction), out)


def rebuilt(source: Path) -> Any:
    """The network in PyTorch with the weights of the file."""
    import torch
    from torch import nn
    from torch.nn import functional

    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(source).graph.initializer}
    depth = len({name.split(".")[1] for name in arrays if name.startswith("layer1.")})

    class Block(nn.Module):
        def __init__(self, inside: int, outside: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outside)
            self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outside)
            self.padding = outside // 4 if stride > 1 else 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
            if self.padding:
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
            return functional.relu(x + y)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
            widths = (16, 16), (16, 32), (32, 64)
            for i, (inside, outside) in enumerate(widths, start=1):
                first = Block(inside, outside, 1 if i == 1 else 2)
                rest = [Block(outside, outside, 1) for _ in range(depth - 1)]
                setattr(self, f"layer{i}", nn.Sequential(first, *rest))
            self.linear = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = functional.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.linear(x.mean(dim=(2, 3)))

    network = Network().eval()
    state = {name: torch.from_numpy(arrays[name].copy()) for name in network.state_dict() if name in arrays}
    missing = [name for name in network.state_dict() if name not in state and "num_batches" not in name]
    if missing:
        raise RuntimeError(f"{source} lacks {', '.join(missing)}")
    network.load_state_dict(state, strict=False)
    return network


def torch_pruned(source: Path, out: Path, target: int, ports: Sequence[str] = ("input", "logits")) -> None:
    """Prune with Torch-Pruning by the L1 norm of filters, the same fraction from every layer, without fine-tuning.

    The channels between the two convolutions of each block go: padded shortcuts tie all others across stages, which
    Torch-Pruning does not follow.
    """
    import torch
    import torch_pruning

    _check_rebuilt(source)
    sample = torch.zeros(1, 3, 32, 32)

    def pruned(fraction: float) -> Any:
        network = rebuilt(source)
        keep = [network.conv1, network.linear]
        keep += [block.conv2 for i in (1, 2, 3) for block in getattr(network, f"layer{i}")]
        importance = torch_pruning.importance.MagnitudeImportance(p=1)
        torch_pruning.pruner.BasePruner(
            network, sample, importance=importance, pruning_ratio=fraction, ignored_layers=keep
        ).step()
        return network

    _exported(rebuilt(source), out, ports)
    # both sides count a little differently (batch norms), so that shares are compared
    whole, counted = macs(out), torch_pruning.utils.count_ops_and_params(rebuilt(source), sample)[0]

    def cost(fraction: float) -> int:
        return round(torch_pruning.utils.count_ops_and_params(pruned(fraction), sample)[0] / counted * whole)

    _exported(pruned(_sought(cost, target)), out, ports)


def _check_rebuilt(source: Path) -> None:
    """See that the network in PyTorch is the one in the file."""
    import torch

    images = np.random.default_rng(0).standard_normal((8, 3, 32, 32), dtype=np.float32)
    session = Reference(source)
    expected = session.run({session.inputs[0]: images})[session.outputs[0]]
    with torch.no_grad():
        got = rebuilt(source)(torch.from_numpy(images)).numpy()
    if not np.allclose(got, expected, atol=1e-3 * float(np.abs(expected).max())):
        raise RuntimeError(f"the rebuilt network differs from {source.name} by {np.abs(got - expected).max():.3g}")


def _exported(network: Any, out: Path, ports: Sequence[str]) -> None:
    import torch

    names = {"input_names": [ports[0]], "output_names": [ports[1]], "dynamic_axes": {ports[0]: {0: "batch"}}}
    with torch.no_grad():
        torch.onnx.export(network.eval(), (torch.zeros(1, 3, 32, 32),), str(out), dynamo=False, **names)
