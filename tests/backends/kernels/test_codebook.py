"""Products with weights in tables equal those with the numbers that codes stand for; looking these up is dense code."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_runner import run, runnable

from graphopt.targets import Isa
from graphopt_backends._compile import llvm_target
from graphopt_backends.arm import TARGETS as ARM
from graphopt_backends.kernels.build import build
from graphopt_backends.kernels.codebook import Codebook
from graphopt_backends.kernels.tables import SIZES, tables_of
from graphopt_backends.x86 import TARGETS as X86

ISAS = runnable()
on_this_cpu = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")
DEVICES = {target.device: target.isa for target in (*X86, *ARM) if target.isa is not None}
few = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)


def _check(kernel: Codebook, number: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = rng.standard_normal((number, kernel.entries)).astype(np.float32)
    codes = rng.integers(0, kernel.entries, (kernel.depth, kernel.columns)).astype(np.uint8)
    a = rng.standard_normal((kernel.rows, kernel.depth)).astype(np.float32)
    weight = tables[np.arange(kernel.columns) // kernel.span, codes]
    operands = [a, kernel.pack(codes), kernel.pack_tables(tables)]
    got = run(kernel, operands, np.empty((kernel.rows, kernel.columns), np.float32))
    np.testing.assert_allclose(got, a.astype(np.float64) @ weight, rtol=1e-4, atol=2e-4 * kernel.depth**0.5)


@on_this_cpu
@few
@given(
    st.sampled_from(ISAS or [None]), st.sampled_from([1, 2, 3, 4, 5, 9, 33]), st.integers(1, 80), st.integers(1, 300),
    st.integers(2, 64), st.integers(1, 80), st.integers(0, 99),
)  # fmt: skip
def test_products_equal_numpy(
    isa: Isa, rows: int, columns: int, depth: int, entries: int, span: int, seed: int
) -> None:
    most = 16 if isa.vector_bits == 256 else 64
    span = min(span, columns)
    _check(Codebook(isa, rows, columns, depth, min(entries, most), span), -(-columns // span), seed)


@on_this_cpu
@pytest.mark.parametrize("depth", [255, 256, 257, 768])
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_sums_end_where_registers_of_codes_do_or_elsewhere(isa: Isa, depth: int) -> None:
    _check(Codebook(isa, 2, 33, depth, 16, 33), 1, depth)


@on_this_cpu
@pytest.mark.parametrize("rows", [17, 40])
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_rows_may_be_more_than_stay_in_the_cache(isa: Isa, rows: int) -> None:
    kernel = Codebook(replace(isa, level2_bytes=1 << 14), rows, 20, 200, 16, 1)
    _check(kernel, 20, rows)


@pytest.mark.parametrize(
    ("device", "most"),
    [("avx2", 16), ("avx512", 64), ("cortex-a53", 64), ("armv7", 0)],
)
def test_tables_have_as_many_entries_as_registers_hold(device: str, most: int) -> None:
    isa = DEVICES[device]
    assert [size for size in (*SIZES, 256) if tables_of(isa, size) is not None] == [
        size for size in SIZES if size <= most
    ]
    assert Codebook(isa, 1, 8, 8, 16, 8).is_known == (most > 0)


def _decoding_loop(kernel: Codebook) -> list[str]:
    """Instructions of the innermost loop that looks most numbers up."""
    module = tvm.IRModule({"kernel": kernel.primitive("kernel").with_attr("global_symbol", "kernel")})
    text = build(module, tvm.target.Target(llvm_target(kernel.isa, 1))).inspect_source("s")
    found, label, body = list[list[str]](), "", list[str]()
    for line in text.splitlines():
        begins = re.match(r"(\.LBB\w+):", line)
        if begins:
            label, body = begins[1], []
        elif re.match(r"\t\w", line):
            body.append(line.split()[0])
            if label and line.endswith(label):
                found.append(body)
                label, body = "", []
    return max(found, key=lambda body: sum(word in _LOOKUPS for word in body))


_LOOKUPS = ("vpermd", "vpermps", "tbl")


@pytest.mark.parametrize("span", [1, 512])
@pytest.mark.parametrize(
    ("device", "rows", "multiply", "most"),
    [("avx512-vnni", 1, "vfmadd", 3.5), ("avx512-vnni", 4, "vfmadd", 2.0), ("avx2", 1, "vfmadd", 9.0),
     ("cortex-a76", 1, "fmla", 6.0), ("cortex-a76", 2, "fmla", 4.2)],
)  # fmt: skip
def test_few_instructions_look_up_what_is_multiplied(
    device: str, rows: int, multiply: str, most: float, span: int
) -> None:
    loop = _decoding_loop(Codebook(DEVICES[device], rows, 512, 768, 16, span))
    products = sum(word.startswith(multiply) for word in loop)
    assert len(loop) <= most * products
