"""The two networks of the Deep Compression paper, trained on handwritten digits, as ONNX models with their data.

Needs torch, and scikit-learn for its digits: `pip install torch scikit-learn`. Nothing is downloaded. MNIST is read
from a folder with its four files, packed with gzip or not.

    LeNet-300-100   784-300-100-10, 266,610 parameters
    LeNet-5         20 and 50 filters of 5 x 5, each followed by max pooling, then 800-500-10: 431,080 parameters
"""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["NETWORKS", "Images", "digits", "mnist", "train"]

NETWORKS = ("LeNet-300-100", "LeNet-5")

_SEED, _BATCH, _RATE, _DECAY = 0, 64, 2e-3, 1e-2
_STEPS = {"LeNet-300-100": 1200, "LeNet-5": 600}
_EPOCHS = 5
"""As many at least."""
_HELD_OUT = 600
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Images:
    """Images `[count, 1, 28, 28]` from 0 to 1 with their classes, to train and to test on."""

    name: str
    train: Array
    train_labels: Array
    test: Array
    test_labels: Array


def digits() -> Images:
    """scikit-learn's digits, 8 x 8, brought to MNIST's form: 20 x 20 in the middle of 28 x 28."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = _enlarged(pixels.reshape(-1, 8, 8) / 16, 20)
    images = np.pad(images, ((0, 0), (4, 4), (4, 4)))[:, None].astype(np.float32)
    split = train_test_split(images, labels, test_size=_HELD_OUT, random_state=_SEED, stratify=labels)
    train_images, test_images, train_labels, test_labels = (np.asarray(part) for part in split)
    return Images("digits", train_images, train_labels, test_images, test_labels)


def _enlarged(images: Array, size: int) -> Array:
    """Bilinear interpolation of `[count, n, n]` to `[count, size, size]`, corners of pixels aligned."""
    n = images.shape[-1]
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.minimum(at.astype(int), n - 2)
    weights = np.zeros((size, n))
    weights[np.arange(size), low], weights[np.arange(size), low + 1] = 1 - (at - low), at - low
    return weights @ images @ weights.T


def mnist(folder: Path) -> Images:
    """MNIST from its own files.

    Raises:
        SystemExit: A file is missing, or is not of that format.
    """
    train, train_labels, test, test_labels = (_idx(folder, name) for name in _FILES)
    images = [(array[:, None] / 255).astype(np.float32) for array in (train, test)]
    labels = [array.astype(np.int64) for array in (train_labels, test_labels)]
    return Images(f"MNIST ({len(train)} to train, {len(test)} to test)", images[0], labels[0], images[1], labels[1])


def _idx(folder: Path, name: str) -> Array:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise SystemExit(f"{folder}: {name} is missing; a folder with MNIST holds {', '.join(_FILES)}")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    zero, kind, axes = struct.unpack(">HBB", content[:4])
    if (zero, kind) != (0, 8):
        raise SystemExit(f"{path}: is not an IDX file of bytes")
    shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def train(name: str, data: Images, out: Path) -> None:
    """Train a network in the ordinary way and write it as ONNX; the same files on every run of one machine.

    Raises:
        SystemExit: torch is not installed.
    """
    try:
        import torch
    except ImportError as e:
        raise SystemExit("training needs torch: pip install torch") from e
    torch.manual_seed(_SEED)
    torch.set_num_threads(1)
    network = _network(name)
    x, y = torch.tensor(data.train), torch.tensor(data.train_labels)
    batches = -(-len(x) // _BATCH)
    epochs = max(_EPOCHS, -(-_STEPS[name] // batches))
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, epochs=epochs, steps_per_epoch=batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(_BATCH):
            loss = torch.nn.functional.cross_entropy(network(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["scores"]}
    axes = {"image": {0: "batch"}, "scores": {0: "batch"}}
    torch.onnx.export(network, (x[:2],), str(out), opset_version=17, dynamic_axes=axes, dynamo=False, **names)


def _network(name: str) -> Any:
    from collections import OrderedDict

    from torch import nn

    if name == "LeNet-300-100":
        return nn.Sequential(
            OrderedDict(
                flat=nn.Flatten(), fc1=nn.Linear(784, 300), relu1=nn.ReLU(), fc2=nn.Linear(300, 100), relu2=nn.ReLU(),
                fc3=nn.Linear(100, 10),
            )
        )  # fmt: skip
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5), pool1=nn.MaxPool2d(2), conv2=nn.Conv2d(20, 50, 5), pool2=nn.MaxPool2d(2),
            flat=nn.Flatten(), fc1=nn.Linear(800, 500), relu=nn.ReLU(), fc2=nn.Linear(500, 10),
        )
    )  # fmt: skip
