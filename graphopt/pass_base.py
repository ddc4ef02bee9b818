"""The contract between the host and a pass.

A pass is a frozen dataclass: its fields are its options, `name` is its spelling, and it prints back to the text it
was parsed from. It mutates the model in place and returns a `PassResult`; it keeps nothing on `self`.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset, Score
from graphopt.errors import PassError
from graphopt.model_io import ShapeBinding
from graphopt.options import non_defaults
from graphopt.pipeline_text import Step
from graphopt.reference import Feed
from graphopt.targets import Target

if TYPE_CHECKING:
    from graphopt.criterion_base import Criterion

__all__ = ["Analysis", "Change", "Context", "Pass", "PassResult", "Progress"]

_T = TypeVar("_T")
_S = TypeVar("_S")
Scalar = int | float | str | bool
Progress = Callable[[Iterable[Any], str], Iterator[Any]]


@dataclass(frozen=True)
class Change:
    """What happened at one site, or why nothing did.

    Attributes:
        site: Name of the node, or of the value, that was looked at.
        action: What was done; for a skipped site `skipped: ` and the reason.
        done: False if the site was left alone.
        details: Figures for the report, such as `{"channels_before": 64, "channels_after": 40}`.
        replaced: Names of nodes that are gone because something else was put in their place.
    """

    site: str
    action: str
    done: bool = True
    details: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])
    replaced: tuple[str, ...] = ()

    @classmethod
    def skipped(cls, site: str, reason: str) -> Change:
        """A site that was looked at and left alone."""
        return cls(site, f"skipped: {reason}", done=False)


class Analysis(abc.ABC, Generic[_T]):
    """Something computed from the model once and shared between passes.

    Analyses are compared as values: two with the same parameters are the same fact. Subclasses are frozen
    dataclasses; a module-level constant (`SHAPES`) is the usual spelling.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def compute(self, model: ir.Model, ctx: Context) -> _T:
        """Compute the fact. The model must not change."""


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        modified: True exactly when the model changed; the runner checks it.
        changes: One entry for every site looked at.
        preserved: Analyses that still hold after a modification. Empty unless argued for in a comment.
        metrics: Figures for the report.
        notes: What the user should not miss, each one sentence without a full stop.
    """

    modified: bool
    changes: tuple[Change, ...] = ()
    preserved: frozenset[Analysis[Any]] = frozenset()
    metrics: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])
    notes: tuple[str, ...] = ()


def _plain_progress(items: Iterable[_S], label: str) -> Iterator[_S]:  # noqa: ARG001
    return iter(items)


@dataclass
class Context:
    """What a pass may use besides the model.

    Attributes:
        model: The model being worked on; facts are computed from it.
        target: What the model is made for.
        rng: A random stream of this step's own.
        calibration: Samples without labels; None if the user gave none.
        binding: Sizes that the user fixed for dynamic dimensions.
        keep_opset: True: refuse rather than raise the opset.
        threads: Threads that ONNX Runtime may use.
        extensions: Libraries with custom operators for ONNX Runtime.
        evaluate: Scores a model on the user's labelled data; returns None without such data.
        criteria: Pruning criteria by name; those of plugins, and built-in ones where they were loaded as such.
        progress: Wraps a loop to show its progress: `for x in ctx.progress(items, "calibrating"): ...`.
        log: Where a pass says what it does.
    """

    model: ir.Model
    target: Target
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    calibration: Dataset | None = None
    binding: ShapeBinding = field(default_factory=ShapeBinding)
    keep_opset: bool = False
    threads: int = 1
    extensions: tuple[str, ...] = ()
    evaluate: Callable[[ir.Model], Score | None] = lambda model: None  # noqa: ARG005
    criteria: Mapping[str, Criterion] = field(default_factory=dict[str, "Criterion"])
    progress: Progress = _plain_progress
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("graphopt"))
    _facts: dict[Analysis[Any], Any] = field(default_factory=dict[Analysis[Any], Any])

    def fact(self, analysis: Analysis[_T]) -> _T:
        """Return a shared analysis of the model, computed on first use and kept until the model changes."""
        if analysis not in self._facts:
            self.log.debug("computing %s", analysis.name)
            self._facts[analysis] = analysis.compute(self.model, self)
        return cast("_T", self._facts[analysis])

    def drop_facts(self, preserved: frozenset[Analysis[Any]] = frozenset()) -> None:
        """Forget every fact but those in `preserved`; a pass calls it when it needs a fact anew halfway through."""
        self._facts = {key: value for key, value in self._facts.items() if key in preserved}


class Pass(abc.ABC):
    """Base of all passes.

    Subclasses are decorated with `@dataclass(frozen=True, kw_only=True)` and set `name` and `lossy`.

    Attributes:
        name: Spelling in pipelines: short, lower case, dashed.
        lossy: False promises equal outputs; the runner checks the promise in ONNX Runtime.
        without_data: What the pass does less well without calibration data, in one line for the user.
    """

    name: ClassVar[str]
    lossy: ClassVar[bool]
    without_data: ClassVar[str] = ""

    def requires(self, model: ir.Model, ctx: Context) -> None:  # noqa: B027
        """Check what must hold before `run`.

        Raises:
            GraphoptError: The pass cannot run on this model or with these options.
        """

    @abc.abstractmethod
    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Rewrite the model in place."""

    def ensures(self, model: ir.Model, ctx: Context) -> None:  # noqa: B027
        """Check what must hold after `run`.

        Raises:
            GraphoptError: The pass did not deliver what it promises.
        """

    def revertible(self, model: ir.Model, sites: Sequence[str]) -> tuple[str, ...]:
        """Those of these sites that `without` can leave alone; none, unless a pass offers it.

        Args:
            model: The model before the step; it must not change.
            sites: Names as in `Change.site`.
        """
        return ()

    def worst_first(
        self,
        model: ir.Model,
        ctx: Context,
        sites: Sequence[str],
        reverted: Sequence[str],
        feeds: Sequence[Feed],
    ) -> tuple[str, ...]:
        """Order sites by what leaving them alone would gain the model's outputs, most first.

        The host asks when the outputs lose too much, and runs the step again without the first few of them.

        Args:
            model: The model before the step; it must not change.
            ctx: As for `run`.
            sites: Sites among `revertible` that the step changed.
            reverted: Sites that are left alone already.
            feeds: Inputs to judge on; what the result is going to be compared with the original on.
        """
        return tuple(sites)

    def without(self, sites: Sequence[str]) -> Self:
        """The same step, leaving these sites alone.

        Args:
            sites: Sites among `revertible`.
        """
        raise self.fail("cannot leave single sites alone")

    def step(self) -> Step:
        """Pipeline step that builds this pass again; defaults are left out."""
        return Step(self.name, tuple(non_defaults(self).items()))

    def __str__(self) -> str:
        return str(self.step())

    def fail(self, fact: str, hint: str | None = None) -> PassError:
        """Build the error to raise when the pass cannot do what was asked."""
        return PassError(str(self), fact, hint)
