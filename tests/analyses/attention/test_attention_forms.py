"""Every form of attention is found, and described so that the description computes the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from attention_check import check_blocks
from attention_forms import CASES, Case
from small_models import context

from graphopt.analyses import ATTENTION, AttentionBlock
from graphopt.model_io import ShapeBinding, input_specs
from graphopt.reference import Feed, random_feed

_SIZES = ({"N": 1, "T": 7, "S": 5, "P": 3}, {"N": 3, "T": 7, "S": 9, "P": 2}, {"N": 2, "T": 7, "S": 1, "P": 1},
          {"N": 3, "T": 7, "S": 4, "P": 6})  # fmt: skip


def found(model: ir.Model) -> tuple[AttentionBlock, ...]:
    return context(model).fact(ATTENTION)


def feeds(model: ir.Model) -> list[Feed]:
    rng = np.random.default_rng(5)
    return [random_feed(input_specs(model), ShapeBinding(dims=sizes), rng) for sizes in _SIZES]


def masks_of(block: AttentionBlock) -> tuple[str, ...]:
    return tuple(mask.kind + (" causal" if mask.causal else "") for mask in block.masks)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_is_found_and_computes_what_its_description_says(case: Case) -> None:
    model = case.model()
    (block,) = found(model)
    told = {name: getattr(block, name) for name in case.expected}
    assert told == {name: pytest.approx(x) if isinstance(x, float) else x for name, x in case.expected.items()}
    assert masks_of(block) == case.masks
    assert check_blocks(model, [block], feeds(model), 1e-5) == len(_SIZES)
