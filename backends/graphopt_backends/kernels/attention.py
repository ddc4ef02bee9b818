"""Attention in one kernel: softmax(scores(Q K^T)) V, block by block, so that no matrix of scores is ever stored.

The softmax streams (Milakov and Gimelshein 2018, FlashAttention by Dao 2022): after every block of keys, sums so far
are scaled to the greatest score so far. Scores are computed transposed, with queries in the lanes of vectors: keys are
read as they lie, and greatest scores and sums are vectors that need no step across lanes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graphopt.targets import Isa
from graphopt_backends.kernels.batched import begin_of, transposed
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    constant,
    either,
    lane,
    load,
    load_below,
    load_first,
    local,
    loop,
    primitive,
    reach,
    share,
    splits,
    spread,
    store,
    store_first,
    tirx,
    when,
)
from graphopt_backends.kernels.epilogue import PLAIN, SUM, begin
from graphopt_backends.kernels.expression import Expression, evaluate, operands
from graphopt_backends.kernels.functions import exp_of_negative
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.multiply import Multiply
from graphopt_backends.kernels.tile import Panel, Rows, accumulate, tile_of

__all__ = ["Attention"]

_LEAST = -3.4028234663852886e38  # where maxima begin: minus infinity minus itself would be no number


@dataclass(frozen=True)
class Attention(Kernel):
    """Y[b, q] = sum over k of softmax over k of scores(Q[b, q] . K[b, k]) times V[b, k], float32, on views.

    Attributes:
        isa: The CPU.
        batch: Sizes of the axes before the matrices.
        queries: Rows of Q and Y.
        keys: Rows of K and V.
        depth: Columns of Q and K.
        width: Columns of V and Y.
        query: Strides of Q: each axis of the batch, then rows; columns follow one another, here and below.
        key: Strides of K.
        value: Strides of V.
        result: Strides of Y.
        scores: What the softmax is taken of: operand 0 is the product, further ones are masks.
        operands: Strides of each mask: each axis of the batch, then queries, then keys.
        causal: Query q sees the keys up to q + causal; None: all.
        empty_is_zero: A query that sees no key has a result of zeros; else it is no number.
    """

    isa: Isa
    batch: tuple[int, ...]
    queries: int
    keys: int
    depth: int
    width: int
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    result: tuple[int, ...]
    scores: Expression = SUM
    operands: tuple[tuple[int, ...], ...] = ()
    causal: int | None = None
    empty_is_zero: bool = False

    @cached_property
    def multiply(self) -> Multiply:
        """The inner loop of both products."""
        return Multiply(self.isa, "f32")

    @property
    def _lanes(self) -> int:
        return self.multiply.lanes

    @cached_property
    def tile(self) -> tuple[int, int]:
        """Keys, and vectors of queries, of a register tile of scores."""
        return tile_of(self.multiply, self.keys, -(-self.queries // self._lanes))

    @cached_property
    def weighing_tile(self) -> tuple[int, int]:
        """Queries, and vectors of columns, of a register tile of the result."""
        return tile_of(self.multiply, min(self._block, self.queries), -(-self.width // self._lanes))

    @property
    def _block(self) -> int:
        """Queries of a unit of work, whole vectors."""
        return self.tile[1] * self._lanes

    @property
    def _blocks(self) -> int:
        return -(-self.queries // self._block)

    @cached_property
    def _tiles(self) -> tuple[tuple[int, int, int], ...]:
        """Tiles of keys: a run of large ones, then perhaps one of those that are a key smaller."""
        return splits(self.keys, self.tile[0])

    @cached_property
    def _steps(self) -> tuple[int, int]:
        """Blocks of keys, and tiles in each: scores of a block stay in the nearest cache."""
        tiles = sum(count for _, count, _ in self._tiles)
        most = max(1, self.isa.level1_bytes // 2 // (4 * self._block * self.tile[0]))
        blocks = -(-tiles // most)
        return blocks, -(-tiles // blocks)

    @property
    def _scores_at(self) -> int:
        """Where scores begin in the scratch memory, behind the transposed queries; then come factors."""
        return self.depth * self._block

    @property
    def _factors_at(self) -> int:
        return self._scores_at + self._steps[1] * self.tile[0] * self._block

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself."""
        return 4 * (self._factors_at + 2 * self._block)

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * math.prod(self.batch) * self.queries * self.keys * (self.depth + self.width)

    def primitive(self, name: str) -> Any:
        """The function: (query, key, value, operands..., result, scratch, task, tasks)."""
        sides = (
            ("query", self.query, self.queries, self.depth), ("key", self.key, self.keys, self.depth),
            ("value", self.value, self.keys, self.width),
        )  # fmt: skip
        dtypes, shape = operands(self.scores), (*self.batch, self.queries, self.keys)
        pointers = [
            *(Pointer(side, "float32", reach((*self.batch, rows), steps) + columns)
              for side, steps, rows, columns in sides),
            *(Pointer(f"operand{i}", dtypes.get(i, "float32"), reach(shape, steps) + 1)
              for i, steps in enumerate(self.operands, 1)),
            Pointer("result", "float32", reach((*self.batch, self.queries), self.result) + self.width),
            Pointer("scratch", "float32", self.scratch // 4),
        ]  # fmt: skip
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        with share(frame, math.prod(self.batch) * self._blocks) as (unit, _):
            number = bind(tirx.truncdiv(unit, self._blocks))
            first = bind(tirx.truncmod(unit, self._blocks) * self._block)
            sides = (self.query, self.key, self.value, self.result, *self.operands)
            query, key, value, result, *masks = (bind(begin_of(self.batch, number, side)) for side in sides)
            self._transpose_queries(frame, query, first)
            place = _Place(first, key, value, result, masks)
            running = _Running(*([local(self._lanes, "float32") for _ in range(self.tile[1])] for _ in range(2)))
            for most, total in zip(running.most, running.total, strict=True):
                store(most, constant(_LEAST, "float32", self._lanes), 0, self._lanes)
                store(total, constant(0, "float32", self._lanes), 0, self._lanes)
            tiles = self._seen_tiles(first)
            with loop(
                self._steps[0] if self.causal is None else tirx.truncdiv(tiles + self._steps[1] - 1, self._steps[1])
            ) as i:
                begun = bind(i * self._steps[1]) if self._steps[0] > 1 else 0
                ended = bind(tirx.min(begun + self._steps[1], tiles))
                self._keys(frame, place, running, begun, ended, tiles)

    def _seen_tiles(self, first: Any) -> Any:
        """How many tiles of keys the queries of a block see."""
        (_, count, high), *rest = self._tiles
        if self.causal is None:
            return count + sum(more for _, more, _ in rest)
        last = tirx.min(first + self._block, self.queries) - 1 + self.causal
        last = bind(tirx.max(0, tirx.min(last, self.keys - 1)))
        if not rest:
            return bind(tirx.truncdiv(last, high) + 1)
        behind = count + tirx.truncdiv(last - count * high, high - 1)
        return bind(tirx.Select(last < count * high, tirx.truncdiv(last, high), behind) + 1)

    def _key_of(self, tile: Any) -> Any:
        """The first key of a tile."""
        (_, count, high), *rest = self._tiles
        return tile * high - tirx.max(0, tile - count) if rest else tile * high

    def _transpose_queries(self, frame: Frame, start: Any, first: Any) -> None:
        """Copy queries to [depth, block]; where there are no more, the last one stands for them."""
        lanes = self._lanes
        whole, rest = divmod(self.depth, lanes)
        with loop(self.tile[1]) as v:
            rows = [
                bind(start + tirx.min(first + v * lanes + i, self.queries - 1) * self.query[-1]) for i in range(lanes)
            ]

            def block(k: Any, count: int) -> None:
                vectors = [bind(load_first(frame["query"], row + k, lanes, count, "float32")) for row in rows]
                for i, vector in enumerate(transposed(vectors, lanes)[:count]):
                    store(frame["scratch"], vector, (k + i) * self._block + v * lanes, lanes)

            if whole:
                with loop(whole) as i:
                    block(i * lanes, lanes)
            if rest:
                block(whole * lanes, rest)

    def _keys(self, frame: Frame, place: _Place, running: _Running, begun: Any, ended: Any, tiles: Any) -> None:
        """One block of keys: scores, weights, and what these add to the result."""
        lanes = self._lanes
        before = [bind(load(most, 0, lanes)) for most in running.most]
        start = bind(self._key_of(begun))
        (_, count, high), *rest = self._tiles
        with loop(ended - begun, begun) as tile:
            if not rest:
                self._scores(frame, place, running, start, bind(tile * high), high)
            else:
                either(
                    tile < count,
                    lambda: self._scores(frame, place, running, start, bind(tile * high), high),
                    lambda: self._scores(frame, place, running, start, bind(self._key_of(tile)), high - 1),
                )
        keys = bind(self._key_of(ended) - start)
        self._weights(frame, running, keys, before, ended == tiles)
        self._weigh(frame, place, start, keys, begun == 0)

    def _scores(self, frame: Frame, place: _Place, running: _Running, start: Any, key: Any, high: int) -> None:
        """Scores of a few keys, stored transposed, and the greatest of each query."""
        lanes, wide = self._lanes, self.tile[1]
        totals = begin(frame, self.multiply, PLAIN, high, wide, 0)
        rows = Rows(frame["key"], bind(place.key + key * self.key[-1]), [r * self.key[-1] for r in range(high)])
        accumulate(self.multiply, totals, rows, Panel(frame["scratch"], 0, self._block), [(self.depth, 1, 1)])
        at = bind(self._scores_at + (key - start) * self._block)
        for v in range(wide):
            query = bind(place.first + v * lanes)
            masks = [self._mask(frame, place, i, query, key, high) for i in range(1, len(self.operands) + 1)]
            for r in range(high):
                given = {0: load(totals[r][v], 0, lanes), **{i: mask[r] for i, mask in enumerate(masks, 1)}}
                score = evaluate(self.scores, given, lanes)
                if self.causal is not None:
                    seen = tirx.Ramp(query + self.causal, 1, lanes) >= spread(key + r, lanes)
                    score = bind(tirx.Select(seen, score, constant(float("-inf"), "float32", lanes)))
                store(frame["scratch"], score, at + r * self._block + v * lanes, lanes)
                store(running.most[v], tirx.max(load(running.most[v], 0, lanes), score), 0, lanes)

    def _mask(self, frame: Frame, place: _Place, number: int, query: Any, key: Any, high: int) -> list[Any]:
        """A mask for a vector of queries, for each of a few keys."""
        lanes, source = self._lanes, frame[f"operand{number}"]
        dtype = operands(self.scores).get(number, "float32")
        *_, query_step, key_step = self.operands[number - 1]
        start = place.masks[number - 1]
        if not query_step:
            return [bind(spread(source[(start + (key + r) * key_step,)], lanes)) for r in range(high)]
        if query_step == 1:
            at, left = bind(start + query), self.queries - query
            whole = self.queries % self._block == 0
            return [
                bind(load(source, at + (key + r) * key_step, lanes) if whole
                     else load_below(source, at + (key + r) * key_step, lanes, left, dtype))
                for r in range(high)
            ]  # fmt: skip
        rows = [bind(start + tirx.min(query + i, self.queries - 1) * query_step) for i in range(lanes)]
        if key_step != 1 or dtype != "float32":
            return [
                bind(tirx.Shuffle([source[(row + (key + r) * key_step,)] for row in rows], list(range(lanes))))
                for r in range(high)
            ]
        found: list[Any] = []
        for part in range(0, high, lanes):
            count = min(lanes, high - part)
            vectors = [bind(load_first(source, row + key + part, lanes, count, dtype)) for row in rows]
            found += transposed(vectors, lanes)[:count]
        return found

    def _weights(self, frame: Frame, running: _Running, keys: Any, before: Sequence[Any], is_last: Any) -> None:
        """Exponentials in place of scores; by how much results so far shrink, and what they are divided by at last."""
        lanes, scratch = self._lanes, frame["scratch"]
        most = [bind(load(vector, 0, lanes)) for vector in running.most]
        one, zero = (constant(i, "float32", lanes) for i in (1, 0))
        for v, total in enumerate(running.total):
            if self._steps[0] > 1:
                shrunk = bind(exp_of_negative(before[v] - most[v], lanes))
                store(scratch, shrunk, self._factors_at + v * lanes, lanes)
                store(total, load(total, 0, lanes) * shrunk, 0, lanes)
        with loop(keys) as k:
            for v, total in enumerate(running.total):
                at = bind(self._scores_at + k * self._block + v * lanes)
                weight = bind(exp_of_negative(load(scratch, at, lanes) - most[v], lanes))
                store(scratch, weight, at, lanes)
                store(total, load(total, 0, lanes) + weight, 0, lanes)
        for v, total in enumerate(running.total):
            factor = one / load(total, 0, lanes)
            if self.empty_is_zero:
                factor = tirx.Select(load(total, 0, lanes) == zero, zero, factor)
            if self._steps[0] > 1:
                factor = tirx.Select(spread(is_last, lanes), factor, one)
            store(scratch, factor, self._factors_at + self._block + v * lanes, lanes)

    def _weigh(self, frame: Frame, place: _Place, start: Any, keys: Any, is_first: Any) -> None:
        """Add weighed values to the result."""
        panel = self.weighing_tile[1] * self._lanes
        whole, rest = divmod(self.width, panel)
        for begin_row, count, high in splits(min(self._block, self.queries), self.weighing_tile[0]):
            with loop(count) as i:
                row = bind(begin_row + i * high)

                def tile(row: Any = row, high: int = high) -> None:
                    if whole:
                        with loop(whole) as j:
                            self._weigh_tile(frame, place, start, keys, is_first, row, high, bind(j * panel), panel)
                    if rest:
                        self._weigh_tile(frame, place, start, keys, is_first, row, high, whole * panel, rest)

                if self.queries % self._block and self._blocks > 1:
                    when(place.first + row < self.queries, tile)
                else:
                    tile()

    def _weigh_tile(
        self, frame: Frame, place: _Place, start: Any, keys: Any, is_first: Any, row: Any, high: int, column: Any,
        columns: int,
    ) -> None:  # fmt: skip
        lanes, scratch = self._lanes, frame["scratch"]
        vectors = [(v * lanes, min(lanes, columns - v * lanes)) for v in range(-(-columns // lanes))]
        totals = begin(frame, self.multiply, PLAIN, high, len(vectors), 0)
        source = bind(place.value + start * self.value[-1] + column)
        with loop(keys) as k:
            values = [
                bind(load_first(frame["value"], source + k * self.value[-1] + first, lanes, count, "float32"))
                for first, count in vectors
            ]
            weights = self._repeated(scratch, bind(self._scores_at + k * self._block + row), high)
            for total, weight in zip(totals, weights, strict=True):
                repeated = weight()
                for sum_, value in zip(total, values, strict=True):
                    store(sum_, load(sum_, 0, lanes) + repeated * value, 0, lanes)
        for r in range(high):

            def finish(r: int = r) -> None:
                at = bind(place.result + (place.first + row + r) * self.result[-1] + column)
                shrunk, factor = (
                    bind(spread(scratch[(self._factors_at + part * self._block + row + r,)], lanes)) for part in (0, 1)
                )
                for v, (first, count) in enumerate(vectors):
                    value = load(totals[r][v], 0, lanes)
                    if self._steps[0] > 1:
                        so_far = load_first(frame["result"], at + first, lanes, count, "float32") * shrunk
                        value = value + tirx.Select(spread(is_first, lanes), constant(0, "float32", lanes), so_far)
                    store_first(frame["result"], value * factor, at + first, lanes, count)

            if self.queries % self._block and self._blocks > 1:
                when(place.first + row + r < self.queries, finish)
            else:
                finish()

    def _repeated(self, buffer: Any, index: Any, count: int) -> list[Any]:
        """Consecutive elements, each to be repeated in all lanes right before it is used."""
        lanes = self._lanes
        if not self.isa.lane_operands:
            return [lambda i=i: bind(spread(buffer[(index + i,)], lanes)) for i in range(count)]
        loaded = [bind(load(buffer, index + i, lanes)) for i in range(0, count, lanes)]
        return [lambda i=i: spread(lane(loaded[i // lanes], i % lanes), lanes) for i in range(count)]


@dataclass(frozen=True)
class _Place:
    """First query of a block, and where its keys, values, result and masks begin."""

    first: Any
    key: Any
    value: Any
    result: Any
    masks: Sequence[Any]


@dataclass(frozen=True)
class _Running:
    """Vectors of queries: the greatest score so far, and the sum of exponentials."""

    most: Sequence[Any]
    total: Sequence[Any]
