"""What happens to scores between their product and the softmax: scale, cap, masks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import onnx_ir as ir

from graphopt.analyses.attention.labels import Labels
from graphopt.analyses.attention.masks import Masks, added_mask, kept_mask
from graphopt.analyses.attention.roles import Roles
from graphopt.analyses.attention.sizes import Sizes
from graphopt.analyses.attention.trail import Step, Trail

__all__ = ["Scoring", "read_steps"]


@dataclass(frozen=True, eq=False)
class Scoring:
    """Scale, cap and masks of scores.

    Attributes:
        labels: What lies along the axes that masks broadcast to.
        masks: The masks.
        number: What multiplies the scores, as far as it is known.
        computed: The same where the graph computes it.
        softcap: 0 for none.
        dropped: What of it is not said here.
    """

    labels: Labels
    masks: Masks = field(default_factory=Masks)
    number: float = 1.0
    computed: ir.Value | None = None
    softcap: float = 0.0
    dropped: str = ""

    @property
    def scale(self) -> float | ir.Value:
        """What multiplies the scores."""
        return self.number if self.computed is None else self.computed

    def but(self, reason: str) -> Scoring:
        """The same with a reason to leave it alone; the first one stays."""
        return self if self.dropped else replace(self, dropped=reason)


def read_steps(trail: Trail, roles: Roles, masks: Masks, factor: float, sizes: Sizes) -> Scoring:
    """Follow the scores from their product to the softmax.

    Args:
        trail: The product and the steps.
        roles: What lies along the axes of the scores.
        masks: To write the masks to.
        factor: What multiplies query and key before they meet.
        sizes: Sizes.
    """
    found = Scoring(roles.made, masks, factor * trail.product.factor)
    for step in trail.steps:
        found = _READERS[step.kind](found, step, roles, sizes)
    if found.computed is not None and found.number != 1:
        found = found.but("its scale is computed in several steps")
    return found


def _layout(found: Scoring, step: Step, roles: Roles, sizes: Sizes) -> Scoring:
    labels = roles.parts.step_on(step.node, found.labels, sizes) or found.labels
    if labels != found.labels and found.masks.masks:
        found = found.but("its scores change their axes behind a mask")
    return replace(found, labels=labels)


def _cast(found: Scoring, step: Step, roles: Roles, sizes: Sizes) -> Scoring:  # noqa: ARG001
    return found


def _scale(found: Scoring, step: Step, roles: Roles, sizes: Sizes) -> Scoring:  # noqa: ARG001
    number = sizes.content(step.operand)
    if found.masks.masks:
        return found.but("its scores are scaled behind a mask")
    if number is None or not number[0]:
        again = found.computed is not None or step.inverse or bool(found.softcap)
        found = found.but("its scale is computed in several steps") if again else found
        return replace(found, computed=step.operand)
    factor = 1 / number[0] if step.inverse else number[0]
    if found.softcap:
        return replace(found, number=found.number * factor, softcap=found.softcap * factor)
    return replace(found, number=found.number * factor)


def _tanh(found: Scoring, step: Step, roles: Roles, sizes: Sizes) -> Scoring:  # noqa: ARG001
    if found.softcap or found.masks.masks:
        return found.but("its scores go through Tanh where a cap does not")
    return replace(found, softcap=1.0)


def _add(found: Scoring, step: Step, roles: Roles, sizes: Sizes) -> Scoring:  # noqa: ARG001
    if step.operand is not None:
        added_mask(step.operand, found.masks, sizes)
    return found


def _where(found: Scoring, step: Step, roles: Roles, sizes: Sizes) -> Scoring:  # noqa: ARG001
    if step.operand is not None:
        kept_mask(step.operand, found.masks, sizes, negated=step.inverse, fill=step.fill, added=False)
    return found


def _other(found: Scoring, step: Step, roles: Roles, sizes: Sizes) -> Scoring:  # noqa: ARG001
    return found.but(f"its scores go through {step.node.op_type} with a tensor")


_READERS = {
    "layout": _layout, "cast": _cast, "scale": _scale, "tanh": _tanh, "add": _add, "where": _where, "other": _other
}  # fmt: skip
