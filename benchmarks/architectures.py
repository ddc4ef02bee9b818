"""Networks of torchvision and transformers with random weights, exported to ONNX without a network.

    python benchmarks/architectures.py resnet50 script FOLDER

Variants: the TorchScript exporter (`script`) and the one on torch.export (`dynamo`), with a fixed batch of one or, with
`-dynamic` behind it, an open batch (and sequence). torch, torchvision and transformers are imported only when a model
is exported; torchvision needs none of its compiled operators.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LARGE", "MODELS", "VARIANTS", "Architecture", "export"]

VARIANTS = ("script", "script-dynamic", "dynamo", "dynamo-dynamic")
_OPSET = {"script": 17, "dynamo": 18}


@dataclass(frozen=True)
class Architecture:
    """How a network is made and fed.

    Attributes:
        build: Makes the network and one feed for it.
        dynamic: Open axes of each input: axis -> name.
    """

    build: Callable[[], tuple[Any, tuple[Any, ...]]]
    dynamic: tuple[dict[int, str], ...] = ({0: "batch"},)


def export(name: str, variant: str, folder: Path) -> Path:
    """Export a network to `folder`, unless it is there already."""
    path = folder / f"{name}.{variant}.onnx"
    if path.exists():
        return path
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)  # its fused operator has no ONNX form
    architecture = (MODELS | LARGE)[name]
    network, feed = architecture.build()
    _shake(network.eval())
    exporter, _, dynamic = variant.partition("-")
    inputs = [f"input{i}" for i in range(len(feed))]
    settings: dict[str, Any] = {"input_names": inputs, "opset_version": _OPSET[exporter]}
    if dynamic and exporter == "script":
        settings["dynamic_axes"] = dict(zip(inputs, architecture.dynamic, strict=True))
    if dynamic and exporter == "dynamo":
        sizes = {text: torch.export.Dim(text) for axes in architecture.dynamic for text in axes.values()}
        shapes = tuple({axis: sizes[text] for axis, text in axes.items()} for axes in architecture.dynamic)
        settings["dynamic_shapes"] = (shapes,)
        feed = tuple(_two(value, axes) for value, axes in zip(feed, architecture.dynamic, strict=True))
    unfinished = path.with_suffix(".part")
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wrapped = _wrapper(network)
        if exporter == "script":
            torch.onnx.export(wrapped, feed, str(unfinished), dynamo=False, **settings)
        else:
            program = torch.onnx.export(wrapped, feed, dynamo=True, verbose=False, **settings)
            program.save(str(unfinished), external_data=False)
    unfinished.rename(path)
    return path


def _shake(network: Any) -> None:
    """Give what is all the same values of its own, and biases others: exporters share and fold ones and zeros.

    Layer scales begin so small, and some last layers at zero, that nothing before them would show.
    """
    import torch

    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            same = bool(tensor.numel()) and bool(tensor.min() == tensor.max())
            if tensor.is_floating_point() and (same or tensor.ndim == 1):
                spread = torch.rand_like(tensor) - 0.5
                tensor.copy_(1 + spread if same and tensor.max() > 0 else tensor + 0.2 * spread)


def _two(value: Any, axes: dict[int, str]) -> Any:
    """Repeat a sample along its open batch: torch.export takes a size of 1 for a constant."""
    return value.repeat([2 if axes.get(axis) == "batch" else 1 for axis in range(value.ndim)])


def _wrapper(network: Any) -> Any:
    """Let a network return plain tensors, whatever containers it likes."""
    import torch

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *feed: Any) -> Any:
            tensors = tuple(_tensors(self.network(*feed)))
            return tensors[0] if len(tensors) == 1 else tensors

    return Plain().eval()


def _tensors(value: Any) -> list[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in _tensors(part)]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _torchvision() -> Any:
    """Import torchvision where its compiled part may be missing; non-maximum suppression is all that is needed."""
    import torch
    from torch.library import Library

    spec = importlib.util.find_spec("torchvision")
    home = Path((spec and spec.origin) or "").parent
    try:
        torch.ops.load_library(str(home / "_C.so"))
    except OSError:
        library: Any = Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", _suppress, "CPU")
        _KEPT.append(library)
    import torchvision

    torchvision.ops.boxes._assert_has_ops = _trusted  # noqa: SLF001
    return torchvision


def _trusted() -> None:
    """Stand in for the check that the compiled part is there; it is compiled along, so it must be a function."""


_KEPT: list[Any] = []  # a library takes its operators with it when it is collected


def _suppress(boxes: Any, scores: Any, threshold: float) -> Any:
    """Plain non-maximum suppression; returns the indices kept, best first."""
    import torch

    order, kept = scores.argsort(descending=True).tolist(), list[int]()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in order:
        corner, end = torch.maximum(boxes[i, :2], boxes[kept, :2]), torch.minimum(boxes[i, 2:], boxes[kept, 2:])
        common = (end - corner).clamp(min=0).prod(dim=1)
        if not (common / (area[i] + area[kept] - common) > threshold).any():
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long)


def _image(name: str, size: int = 224, family: str = "", **settings: Any) -> Architecture:
    """A network of torchvision that takes images."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import torch

        home = _torchvision().models
        for part in filter(None, family.split(".")):
            home = getattr(home, part)
        return getattr(home, name)(weights=None, **settings), (torch.randn(1, 3, size, size),)

    return Architecture(build)


def _detector() -> tuple[Any, tuple[Any, ...]]:
    """SSDLite with its box decoding and suppression, for one image."""
    import torch

    home = _torchvision().models.detection
    network = home.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, topk_candidates=50)

    class Single(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: Any) -> Any:
            return self.network([image[0]])

    return Single(), (torch.rand(1, 3, 320, 320),)


def _heads() -> tuple[Any, tuple[Any, ...]]:
    """SSDLite up to its box and class heads."""
    import torch

    home = _torchvision().models.detection
    network = home.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)

    class Heads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: Any) -> Any:
            return self.network.head(list(self.network.backbone(image).values()))

    return Heads(), (torch.randn(1, 3, 320, 320),)


def _raft() -> tuple[Any, tuple[Any, ...]]:
    """RAFT, optical flow between two images, two refinements."""
    import torch

    network = _torchvision().models.optical_flow.raft_small(weights=None)

    class Short(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, first: Any, second: Any) -> Any:
            return self.network(first, second, num_flow_updates=2)[-1]

    return Short(), (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))


def _text(network: str, config: str, inputs: int = 2, sequence: int = 32, **settings: Any) -> Architecture:
    """A network of transformers that takes token ids and, mostly, a mask."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import torch

        _torchvision()  # transformers imports it
        import transformers

        made = getattr(transformers, network)(getattr(transformers, config)(**settings))
        made.config.return_dict = True
        ids = torch.randint(0, 100, (1, sequence))
        return _Keywords.of(made, ("input_ids", "attention_mask")), (ids, torch.ones_like(ids))[:inputs]

    return Architecture(build, ({0: "batch", 1: "sequence"},) * inputs)


def _whisper() -> tuple[Any, tuple[Any, ...]]:
    """The encoder of Whisper tiny, two layers."""
    import torch

    _torchvision()  # transformers imports it
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(d_model=384, encoder_layers=2, encoder_attention_heads=6, encoder_ffn_dim=1536)
    return _Keywords.of(WhisperEncoder(config), ("input_features",)), (torch.randn(1, 80, 3000),)


class _Keywords:
    @staticmethod
    def of(network: Any, names: tuple[str, ...]) -> Any:
        """Feed a network of transformers by keyword, without caches."""
        import torch

        class Keywords(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, *feed: Any) -> Any:
                found = self.network(**dict(zip(names, feed, strict=False)))
                return found.logits if getattr(found, "logits", None) is not None else found.last_hidden_state

        return Keywords()


MODELS: dict[str, Architecture] = {
    "resnet18": _image("resnet18"),
    "resnet50": _image("resnet50"),
    "resnext50": _image("resnext50_32x4d"),
    "densenet121": _image("densenet121"),
    "mobilenet_v2": _image("mobilenet_v2"),
    "mobilenet_v3": _image("mobilenet_v3_large"),
    "efficientnet_b0": _image("efficientnet_b0"),
    "shufflenet_v2": _image("shufflenet_v2_x1_0"),
    "squeezenet": _image("squeezenet1_1"),
    "googlenet": _image("googlenet", init_weights=True),
    "inception_v3": _image("inception_v3", 299, init_weights=True),
    "vgg16_bn": _image("vgg16_bn"),
    "convnext_tiny": _image("convnext_tiny"),
    "regnet_x": _image("regnet_x_400mf"),
    "regnet_y": _image("regnet_y_400mf"),
    "mnasnet": _image("mnasnet1_0"),
    "vit_b_16": _image("vit_b_16"),
    "swin_t": _image("swin_t"),
    "fcn_resnet50": _image("fcn_resnet50", family="segmentation", weights_backbone=None),
    "deeplabv3_resnet50": _image("deeplabv3_resnet50", 320, family="segmentation", weights_backbone=None),
    "ssdlite320": Architecture(_heads),
    "ssdlite320_full": Architecture(_detector, ({},)),
    "raft_small": Architecture(_raft, ({0: "batch"},) * 2),
    "bert": _text("BertModel", "BertConfig", num_hidden_layers=2, vocab_size=3000),
    "bert_classifier": _text(
        "BertForSequenceClassification", "BertConfig", num_hidden_layers=2, vocab_size=3000, num_labels=3
    ),
    "distilbert": _text("DistilBertModel", "DistilBertConfig", n_layers=2, vocab_size=3000),
    "gpt2": _text("GPT2LMHeadModel", "GPT2Config", n_layer=2, vocab_size=3000, use_cache=False),
    "llama_gqa": _text(
        "LlamaForCausalLM",
        "LlamaConfig",
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=3000,
        use_cache=False,
    ),
    "t5_encoder": _text("T5EncoderModel", "T5Config", num_layers=2, vocab_size=3000),
    "whisper_encoder": Architecture(_whisper),
}

LARGE: dict[str, Architecture] = {"bert_base": _text("BertModel", "BertConfig", sequence=128)}
"""Networks in their full size, which tables over all architectures leave out."""


if __name__ == "__main__":
    export(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
