"""From Relax to an object file: integer arithmetic, fusion, default schedules, LLVM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphopt.errors import BackendError
from graphopt.targets import Isa
from graphopt_backends._link import Linker
from graphopt_backends._schedule import schedule_module

__all__ = ["as_loops", "compile_library", "llvm_target"]


def llvm_target(isa: Isa, threads: int) -> dict[str, Any]:
    """Describe a CPU to TVM."""
    # level 3 takes three times as long and makes no kernel faster
    target: dict[str, Any] = {
        "kind": "llvm", "mtriple": isa.triple, "num-cores": threads or isa.cores, "opt-level": 2
    }  # fmt: skip
    if isa.cpu:
        target["mcpu"] = isa.cpu
    if isa.features:
        target["mattr"] = list(isa.features)
    return target


def compile_library(module: Any, isa: Isa, path: Path, linker: Linker, threads: int, emit: tuple[str, ...]) -> None:
    """Compile an imported module into the shared library `path`, and its IR and assembly beside it where asked for.

    Raises:
        BackendError: TVM, LLVM or the linker fails.
    """
    import tvm
    from tvm import relax

    target = tvm.target.Target(llvm_target(isa, threads))
    try:
        with target:
            module = _optimize(module, isa)
            executable = relax.build(module, target, relax_pipeline=_finish())
    except Exception as e:  # TVM's passes raise their own untyped errors
        raise BackendError(path.name, f"TVM cannot compile it: {_reason(e)}", "try --fallback ort") from e
    for kind, suffix in (("asm", "s"), ("source", "ll")):
        if kind in emit:
            for i, part in enumerate(executable.mod.imports):
                name = path.with_suffix(f".{suffix}" if i == 0 else f".{i}.{suffix}")
                name.write_text(part.inspect_source(suffix), "utf8")
    executable.export_library(str(path), fcompile=linker.shared)


def _optimize(module: Any, isa: Isa) -> Any:
    from tvm import relax

    return schedule_module(as_loops(module, relax.backend.DispatchSampling(), relax.backend.DispatchSortScan()), isa)


def as_loops(module: Any, *dispatch: Any) -> Any:
    """Turn an imported module into calls of primitive functions on plain loops, fused, integers kept as such.

    Args:
        module: What the importer made.
        dispatch: Passes that choose a library for some operators.
    """
    import tvm
    from tvm.relax import transform

    from graphopt_backends._integer import use_integers

    module = use_integers(module)
    keep = ["relax.dequantize"]
    passes = [
        transform.DeadCodeElimination(),
        *dispatch,
        transform.DecomposeOpsForInference(),
        # constants are folded before dequantize becomes a function, so that weights stay integers in the library
        transform.LegalizeOps(skip_ops=keep),
        transform.FoldConstant(),
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.DeadCodeElimination(),
    ]
    return tvm.transform.Sequential(passes)(module)


def _finish() -> Any:
    """Lower the dataflow to what the virtual machine runs."""
    import tvm
    from tvm.relax import transform

    return tvm.transform.Sequential(
        [
            transform.RewriteDataflowReshape(),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )


def _reason(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(e).__name__
