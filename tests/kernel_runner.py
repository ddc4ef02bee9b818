"""Builds one kernel and runs it on arrays: what the tests of kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm

from graphopt.targets import Isa, host_features, host_machine
from graphopt_backends._compile import llvm_target
from graphopt_backends.kernels.build import build
from graphopt_backends.network.program import Place, Step, module

_AVX2 = ("+avx2", "+fma", "+f16c", "+bmi", "+bmi2", "+lzcnt", "+movbe")
_AVX512 = (*_AVX2, "+avx512f", "+avx512bw", "+avx512cd", "+avx512dq", "+avx512vl")
_TRIPLE = "x86_64-linux-gnu"
AVX2 = Isa(name="avx2", triple=_TRIPLE, cpu="x86-64", features=_AVX2, vector_bits=256, registers=16)
AVX512 = Isa(
    name="avx512-vnni", triple=_TRIPLE, cpu="x86-64", features=(*_AVX512, "+avx512vnni"), vector_bits=512,
    registers=32, dot="vnni",
)  # fmt: skip


def runnable() -> list[Isa]:
    """Those of the CPUs above that this machine can run."""
    if host_machine() != "x86_64":
        return []
    have = host_features()
    found = [AVX2] if {"avx2", "fma"} <= have else []
    return [*found, AVX512] if {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"} <= have else found


def run(kernel: Any, arrays: Sequence[np.ndarray], result: np.ndarray, tasks: int = 2) -> np.ndarray:
    """Run a kernel with arrays as its pointers; what lies behind the result must not change.

    Args:
        kernel: What to run.
        arrays: Its operands, packed as it wants them.
        result: Shape and type of what it writes.
        tasks: Tasks that share the work.
    """
    guarded = np.full(result.nbytes + 256, 171, np.uint8)
    names = [f"operand_{i}" for i in range(len(arrays))]
    parameters = {name: array.nbytes for name, array in zip(names, arrays, strict=True)}
    parameters |= {"result": guarded.nbytes, "workspace": 64 + kernel.scratch * tasks}
    step = Step("kernel", tuple(Place(name) for name in (*names, "result")), tasks, kernel.scratch)
    made = module({"kernel": kernel.primitive("kernel")}, parameters, [step])
    main = build(made, tvm.target.Target(llvm_target(kernel.isa, tasks)))["main"]
    memory = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
    tensors = [tvm.runtime.tensor(a) for a in (*memory, guarded, np.zeros(parameters["workspace"], np.uint8))]
    main(*tensors)
    written = tensors[len(arrays)].numpy()
    assert (written[result.nbytes :] == 171).all(), "written behind the result"
    return written[: result.nbytes].view(result.dtype).reshape(result.shape)
