"""A thin layer over TVM's IR builder: functions on plain pointers, vectors, and loops over a task's share.

A kernel is a function of pointers that computes the share of one of `tasks` tasks. It allocates nothing and calls
nothing, so that a whole network can run in one parallel region with a barrier between two kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as statements

__all__ = [
    "Frame",
    "Pointer",
    "T",
    "add_to",
    "bind",
    "cast",
    "constant",
    "each_part",
    "each_vector",
    "either",
    "first_lanes",
    "intrinsic",
    "known_late",
    "lane",
    "load",
    "load_below",
    "load_first",
    "local",
    "loop",
    "place_of",
    "prefetch",
    "primitive",
    "reach",
    "reinterpret",
    "sealed",
    "share",
    "share_pairs",
    "share_vectors",
    "splits",
    "spread",
    "start_of",
    "store",
    "store_first",
    "tirx",
    "when",
]

tirx: Any = tvm.tirx
"""TVM's expressions; their annotations ask for what they convert by themselves."""

T: Any = statements
"""TVM's statements, added to the function that is being built."""

Expr = Any
"""An expression of TVM's, a vector or a scalar."""

Buffer = Any
"""Elements behind a pointer, indexed by one number."""


@dataclass(frozen=True)
class Pointer:
    """A parameter of a kernel.

    Attributes:
        name: Name in the code.
        dtype: Element type.
        size: Elements behind it; only what is read or written must be there.
    """

    name: str
    dtype: str
    size: int


@dataclass(frozen=True)
class Frame:
    """What the body of a kernel sees.

    Attributes:
        buffers: Elements by parameter.
        numbers: Sizes that are known when the kernel runs.
        task: Number of this task.
        tasks: Number of tasks.
    """

    buffers: Mapping[str, Buffer]
    numbers: Mapping[str, Expr]
    task: Expr
    tasks: Expr

    def __getitem__(self, name: str) -> Buffer:
        """The elements behind a pointer."""
        return self.buffers[name]


def primitive(
    name: str, pointers: Sequence[Pointer], body: Callable[[Frame], None], numbers: Sequence[str] = ()
) -> Any:
    """A private PrimFunc `name(pointers..., numbers..., task, tasks)`.

    Args:
        name: Its name; the same code always has the same.
        pointers: Memory that it reads and writes; none of it overlaps.
        body: Emits the code.
        numbers: Further parameters, int32.
    """
    builder = IRBuilder()
    with builder, T.prim_func(is_private=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        dtypes = [_stored(p.dtype) for p in pointers]
        handles = [T.arg(p.name, T.handle(dtype)) for p, dtype in zip(pointers, dtypes, strict=True)]
        sizes = {number: T.arg(number, T.int32()) for number in numbers}
        task, tasks = T.arg("task", T.int32()), T.arg("tasks", T.int32())
        buffers = {
            p.name: T.decl_buffer((p.size,), dtype, data=handle)
            for p, dtype, handle in zip(pointers, dtypes, handles, strict=True)
        }
        body(Frame(buffers, sizes, task, tasks))
    return builder.get()


def _stored(dtype: str) -> str:
    """The type of elements in memory: a bfloat16 is bits, which few CPUs compute with."""
    return "uint16" if dtype == "bfloat16" else dtype


def load(buffer: Buffer, index: Expr, lanes: int) -> Expr:
    """Consecutive elements."""
    return buffer[(tirx.Ramp(index, 1, lanes),)] if lanes > 1 else buffer[(index,)]


def store(buffer: Buffer, value: Expr, index: Expr, lanes: int) -> None:
    """Write consecutive elements."""
    T.buffer_store(buffer, value, [tirx.Ramp(index, 1, lanes) if lanes > 1 else index])


def add_to(total: Buffer, value: Expr, lanes: int) -> None:
    """Add a vector to an accumulator."""
    store(total, load(total, 0, lanes) + value, 0, lanes)


def place_of(index: Expr) -> Expr:
    """A place that constants are added to: where it has all bits of an address, they become parts of instructions."""
    return index if isinstance(index, int) else bind(cast(index, "int64", 1))


def load_first(buffer: Buffer, index: Expr, lanes: int, count: int, dtype: str) -> Expr:
    """The first `count` of `lanes` elements, zeros behind them; nothing behind them is read."""
    if count >= lanes:
        return load(buffer, index, lanes)
    zero = constant(0, dtype, lanes)
    return tirx.call_llvm_pure_intrin(
        f"{dtype}x{lanes}", "llvm.masked.load", tirx.address_of(buffer[(index,)]), first_lanes(lanes, count), zero
    )


def load_below(buffer: Buffer, index: Expr, lanes: int, count: Expr, dtype: str) -> Expr:
    """The first `count` of `lanes` elements, which is known when the kernel runs; zeros behind them."""
    mask = tirx.Ramp(tirx.const(0, "int32"), 1, lanes) < spread(count, lanes)
    address = tirx.address_of(buffer[(index,)])
    return intrinsic("llvm.masked.load", dtype, lanes, address, mask, constant(0, dtype, lanes))


def store_first(buffer: Buffer, value: Expr, index: Expr, lanes: int, count: int) -> None:
    """Write the first `count` of `lanes` elements; nothing behind them is touched."""
    if count >= lanes:
        store(buffer, value, index, lanes)
        return
    if count == 1:  # LLVM 22 writes all four bytes of a narrowed lane where a mask has one place
        store(buffer, lane(value, 0), index, 1)
        return
    address = tirx.address_of(buffer[(index,)])
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.masked.store", value, address, first_lanes(lanes, count)))


def first_lanes(lanes: int, count: int) -> Expr:
    """True in the first `count` lanes."""
    return tirx.Shuffle([tirx.const(i < count, "bool") for i in range(lanes)], list(range(lanes)))


def prefetch(buffer: Buffer, index: Expr) -> None:
    """Ask for the cache line of an element; it need not exist."""
    read, keep, data = (tirx.const(number, "int32") for number in (0, 3, 1))
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", tirx.address_of(buffer[(index,)]), read, keep, data))


def bind(value: Expr) -> Expr:
    """Name a value, so that it is computed once."""
    return T.bind(value)


def sealed(value: Expr, lanes: int) -> Expr:
    """The same floats, put aside, where TVM's simplifier does not look behind; LLVM keeps them in a register.

    The simplifier puts what names stand for into every comparison that it meets, and into what that stands for: time
    grows exponentially with the comparisons one after another.
    """
    held = local(lanes, "float32")
    store(held, value, 0, lanes)
    return bind(load(held, 0, lanes))


def known_late(frame: Frame, number: Expr) -> Expr:
    """The same number of zero or more, which LLVM cannot know: no loop is unrolled, no place shares an address."""
    return bind(tirx.max(number, -frame.task))


def constant(value: float, dtype: str, lanes: int = 1) -> Expr:
    """A number in all lanes."""
    return spread(tirx.const(int(value) if "float" not in dtype else float(value), dtype), lanes)


def spread(value: Expr, lanes: int) -> Expr:
    """A scalar in all lanes."""
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def lane(vector: Expr, index: int) -> Expr:
    """One element of a vector."""
    return tirx.Shuffle([vector], [index])


def cast(value: Expr, dtype: str, lanes: int) -> Expr:
    """Convert elements; floats lose their fraction."""
    return tirx.Cast(_vector(dtype, lanes), value)


def reinterpret(value: Expr, dtype: str, lanes: int) -> Expr:
    """The same bits as elements of another type."""
    return T.reinterpret(_vector(dtype, lanes), value)


def intrinsic(name: str, dtype: str, lanes: int, *values: Expr) -> Expr:
    """Call an intrinsic of LLVM without side effects."""
    return tirx.call_llvm_pure_intrin(_vector(dtype, lanes), name, *values)


def _vector(dtype: str, lanes: int) -> str:
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def local(size: int, dtype: str) -> Buffer:
    """Elements in registers, or on the stack: what is in registers is indexed by constants only."""
    return T.alloc_buffer((size,), dtype, scope="local", annotations={"disable_lower_builtin": True})


@contextmanager
def loop(count: Expr, first: Expr = 0) -> Iterator[Expr]:
    """Count from `first`; a loop of one turn is none."""
    if isinstance(count, int) and count == 1:
        yield first
        return
    with T.serial(0, count) as index:
        yield index if isinstance(first, int) and first == 0 else first + index


@contextmanager
def share(frame: Frame, units: Expr) -> Iterator[tuple[Expr, Expr]]:
    """Count over this task's part of `units` units of work, as large as that of every other; also gives the first."""
    first = bind(tirx.truncdiv(frame.task * units, frame.tasks))
    last = bind(tirx.truncdiv((frame.task + 1) * units, frame.tasks))
    with T.serial(first, last) as index:
        yield index, first


@contextmanager
def share_pairs(frame: Frame, outer: int, inner: int) -> Iterator[tuple[Expr, Expr, Expr]]:
    """Count over the outer units of this task's part of `outer` times `inner` units; also gives the inner ones of each.

    Yields:
        An outer unit, and the first inner unit of it and the one behind the last that are this task's.
    """
    first = bind(tirx.truncdiv(frame.task * (outer * inner), frame.tasks))
    last = bind(tirx.truncdiv((frame.task + 1) * (outer * inner), frame.tasks))
    with T.serial(tirx.truncdiv(first, inner), tirx.truncdiv(last + inner - 1, inner)) as index:
        yield index, bind(tirx.max(0, first - index * inner)), bind(tirx.min(inner, last - index * inner))


def when(condition: Expr, then: Callable[[], None]) -> None:
    """Emit code for a condition."""
    with T.If(condition), T.Then():
        then()


def either(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Emit both branches of a condition."""
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def each_vector(count: int, lanes: int, body: Callable[[Expr, int], None]) -> None:
    """Emit code for consecutive elements: `body(index, lanes)` for vectors, then one by one for what is left."""
    whole, rest = divmod(count, lanes)
    if whole:
        with loop(whole) as i:
            body(i * lanes, lanes)
    if rest:
        with loop(rest) as i:
            body(whole * lanes + i, 1)


def each_part(count: int, lanes: int, body: Callable[[Expr, int], None], unrolled: int = 4) -> None:
    """Emit code for consecutive elements: `body(index, valid)` for vectors, all of them whole but the last.

    Args:
        count: Elements.
        lanes: Of a vector.
        body: Reads and writes no more than `valid` elements from an index on.
        unrolled: Vectors in one turn of the loop.
    """
    whole, rest = divmod(count, lanes)
    turns, more = divmod(whole, unrolled)
    if turns:
        with loop(turns) as i:
            for j in range(unrolled):
                body((i * unrolled + j) * lanes, lanes)
    for j in range(more):
        body((turns * unrolled + j) * lanes, lanes)
    if rest:
        body(whole * lanes, rest)


def reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first of a tensor to its last."""
    return sum((size - 1) * max(0, stride) for size, stride in zip(shape, strides, strict=True))


def share_vectors(frame: Frame, rows: int, columns: int, lanes: int, body: Callable[[Expr, Expr, int], None]) -> None:
    """Emit code for vectors of columns, of which tasks share all: `body(row, first column, how many are there)`."""
    vectors = -(-columns // lanes)
    rest = columns - (vectors - 1) * lanes
    with share(frame, rows * vectors) as (unit, _):
        row, vector = bind(tirx.truncdiv(unit, vectors)), bind(tirx.truncmod(unit, vectors))
        if rest == lanes:
            body(row, vector * lanes, lanes)
            return
        either(
            vector < vectors - 1,
            lambda: body(row, vector * lanes, lanes),
            lambda: body(row, vector * lanes, rest),
        )


def splits(total: int, most: int) -> tuple[tuple[int, int, int], ...]:
    """Cover `total` by blocks of at most `most`, as even as possible: (start, number of blocks, size), one or two."""
    blocks = -(-total // most)
    size, larger = divmod(total, blocks)
    found: list[tuple[int, int, int]] = []
    if larger:
        found.append((0, larger, size + 1))
    if blocks > larger:
        found.append((larger * (size + 1), blocks - larger, size))
    return tuple(found)


def start_of(blocks: Sequence[tuple[int, int, int]], index: Expr) -> Expr:
    """Where a block of `splits` begins, whose number is known when the kernel runs."""
    if len(blocks) == 1:
        return index * blocks[0][2]
    (_, count, high), (start, _, low) = blocks
    return tirx.Select(index < count, index * high, start + (index - count) * low)
