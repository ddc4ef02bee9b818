"""The pass: which weights get codebooks of what size, and what they make of the model."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import onnx_ir as ir

from graphopt.errors import OptionError
from graphopt.options import opt
from graphopt.pass_base import Context, Pass, PassResult
from graphopt.reference import Feed
from graphopt_passes.share.fit import Method
from graphopt_passes.share.ranking import rank
from graphopt_passes.share.rewrite import Plan, share_weights
from graphopt_passes.share.tensors import choose, find_tensors

__all__ = ["Share"]


@dataclass(frozen=True, kw_only=True)
class Share(Pass):
    """Store each weight as the number of an entry in a small codebook (weight sharing, clustering, palettization).

    A codebook of 2 to 256 numbers is fitted to each tensor, or with `channels` to each group of its output channels, by
    k-means, which in one dimension is solved exactly (for very large tensors nearly so; the report says which). Errors
    count by the size of their row and column, and those of a convolution's kernel make up for each other, since
    neighbours in an image resemble each other. With calibration data they count by what the layer makes of them: codes
    are chosen input by input, later ones make up for earlier ones, and the numbers of the codebook are fitted again to
    the codes. Whether errors of a layer's outputs count as they are or relative to the size of each output is tried
    layer by layer: some samples are run through the model, and what changes its outputs less stays. Weights that are
    zero, as after pruning, stay exactly zero; of vectors (`width`) those that are zero as a whole.

    The result is plain ONNX: codes of 2, 4 or 8 bits in initializers, Cast, and Gather from the codebook before the
    layer, whatever its operator is; layers that share a weight go on sharing it. The file becomes smaller. ONNX Runtime
    computes the lookups when it loads the model, so that memory and speed are those of float weights there.

    Codes of 3 bits take 4 in the file, and those of 5 to 7 take 8. The opset is raised to what the codes need: 21 for 4
    bits, 25 for 2. For a target that computes on integers alone, weights stay weights, of few values each: its own
    compiler codes what often occurs in few bits.

    Leaves alone, with the reason: weights that are computed, quantized already or replaceable by the caller, outputs of
    the model, vectors, and tensors so small that a codebook would cost more than it saves.
    """

    name: ClassVar[str] = "share"
    lossy: ClassVar[bool] = True
    without_data: ClassVar[str] = "codebooks fit the weights alone, errors counting by the size of row and column"

    bits: int = opt(4, help="bits of a code; a codebook has up to 2^bits entries", ge=1, le=8)
    entries: int | None = opt(None, help="size of a codebook; none: 2^bits", ge=2, le=256)
    channels: int = opt(0, help="output channels that share a codebook; 0: all of a tensor", ge=0)
    width: Literal[1, 2, 4] = opt(1, help="weights that one code stands for: 2 or 4 neighbours, entries are vectors")
    algorithm: Literal["auto", "nearest", "relative", "weighted", "compensated"] = opt(
        "auto",
        help="nearest: k-means of the weights; relative: errors count by the size of row and column; weighted: by "
        "moments of the input; compensated: codes make up for each other's errors; auto: the last with data, else "
        "relative",
    )
    damping: float = opt(0.05, help="compensated: share of the mean moment added to all moments", gt=0, le=1)
    bias_correction: bool = opt(True, help="take out of biases what codebooks add to the mean of a layer's result")
    int8: bool = opt(False, help="store codebooks in int8")
    only: tuple[str, ...] = opt((), help="only layers whose name matches one of these patterns")
    skip: tuple[str, ...] = opt((), help="leave layers alone whose name matches one of these patterns")

    def requires(self, model: ir.Model, ctx: Context) -> None:
        """Check that options go together, that data is there, and that the patterns match something.

        Raises:
            OptionError: They do not, or it is not.
        """
        if self.entries is not None and self.bits != Share.bits and self.entries > 2**self.bits:
            fact = f"{self.entries} do not fit codes of {self.bits} bits"
            raise OptionError("share.entries", fact, "leave bits or entries out")
        if self.width > 1 and self.channels:
            fact = f"groups of channels have codebooks of numbers, width={self.width} makes vectors"
            raise OptionError("share.channels", fact, "leave channels or width out")
        if self.width > 1 and self.algorithm == "compensated":
            fact = f"'compensated' finds single numbers, width={self.width} makes vectors"
            raise OptionError("share.algorithm", fact, "use algorithm=weighted")
        if ctx.calibration is None and self.algorithm in ("weighted", "compensated"):
            fact = f"{self.algorithm!r} needs calibration data"
            raise OptionError("share.algorithm", fact, "give --calibration, or algorithm=nearest")
        choose(find_tensors(model)[0], self.only, self.skip)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Rewrite a copy and, if it is smaller, let its graph replace the model's."""
        return share_weights(model, ctx, self._plan(in_place=ctx.target.integers.integers_only))

    def revertible(self, model: ir.Model, sites: Sequence[str]) -> tuple[str, ...]:
        """Layers with weights."""
        known = {site.name for tensor in find_tensors(model)[0] for site in tensor.sites}
        return tuple(site for site in sites if site in known)

    def worst_first(
        self, model: ir.Model, ctx: Context, sites: Sequence[str], reverted: Sequence[str], feeds: Sequence[Feed]
    ) -> tuple[str, ...]:
        """Order layers by the noise that codebooks of their weights alone make at the outputs."""
        return rank(model, ctx, self._plan(), sites, feeds)

    def without(self, sites: Sequence[str]) -> Self:
        """The same step with these layers among `skip`."""
        return replace(self, skip=(*self.skip, *map(glob.escape, sites)))

    def _plan(self, *, in_place: bool = False) -> Plan:
        method = Method(self.entries or 2**self.bits, self.algorithm, self.damping, self.int8)
        return Plan(
            method,
            self.channels,
            self.width,
            self.only,
            self.skip,
            bias_correction=self.bias_correction,
            in_place=in_place,
        )
