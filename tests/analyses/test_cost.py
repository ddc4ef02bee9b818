from __future__ import annotations

import pytest
from small_models import build, context

from graphopt.analyses import COST

CODES = "codes = Constant <value = uint8[4,2] {0, 1, 1, 0, 0, 1, 1, 0}> ()\n"


@pytest.mark.parametrize(
    ("weight", "params", "bytes_"),
    [
        ("w = DequantizeLinear(codes, scale)", 8 + 1, 8 + 4),
        ("cast = Cast <to = 1> (codes)\nw = Mul(cast, scale)", 8 + 1, 8 + 4),
        ("numbers = Cast <to = 6> (codes)\nw = Gather(book, numbers)", 8 + 2, 8 + 8),
    ],
)
def test_what_a_weight_is_computed_from_counts_for_the_layer_that_reads_it(
    weight: str, params: int, bytes_: int
) -> None:
    body = f"{CODES}{weight}\ny = MatMul(x, w)"
    model = build("(float[3,4] x) => (float[3,2] y)", body, {"scale": (), "book": (2,)}, opset=19)
    nodes = context(model).fact(COST).nodes.values()
    assert {cost.operator: (cost.params, cost.weight_bytes) for cost in nodes if cost.params} == {
        "MatMul": (params, bytes_)
    }
    assert {cost.operator: cost.moved_bytes for cost in nodes if cost.moved_bytes} == {"MatMul": 4 * (3 * 4 + 3 * 2)}


def test_noise_shaped_like_a_constant_is_no_weight() -> None:
    body = "noise = RandomNormalLike(w)\ny = MatMul(x, noise)"
    nodes = context(build("(float[3,4] x) => (float[3,2] y)", body, {"w": (4, 2)})).fact(COST).nodes.values()
    assert {cost.operator: cost.params for cost in nodes} == {"RandomNormalLike": 8, "MatMul": 0}
