"""Windows of operators that have one themselves."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analyses.attention import AttentionBlock

__all__ = ["narrow", "takes_window"]

_WINDOW = "local_window_size"


def takes_window(block: AttentionBlock) -> bool:
    """Whether a core is an operator of ONNX Runtime that is causal, and that no window narrows yet.

    It counts the query itself: a window of w shows keys at a distance below w, also behind a cache.
    """
    node = _operator(block)
    return (
        node is not None
        and block.causal == "yes"
        and bool(node.attributes.get_int("causal", 1))
        and node.attributes.get_int(_WINDOW, -1) <= 0
    )


def narrow(block: AttentionBlock, width: int) -> None:
    """Give an operator its window; what it caches and hides stays as it is."""
    node = _operator(block)
    assert node is not None
    node.attributes[_WINDOW] = ir.AttrInt64(_WINDOW, width)


def _operator(block: AttentionBlock) -> ir.Node | None:
    node = block.nodes[-1]
    return node if (node.domain, node.op_type) == ("com.microsoft", "GroupQueryAttention") else None
