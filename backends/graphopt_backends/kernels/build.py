"""From a module of kernels to machine code: only those of TVM's passes that straight code on pointers needs."""

from __future__ import annotations

from typing import Any

__all__ = ["build"]


def build(module: Any, target: Any) -> Any:
    """Compile a module made by `program.module`; returns a runtime module that writes object files and listings.

    Args:
        module: Kernels and their entry function.
        target: TVM's target.
    """
    import tvm
    from tvm import tirx

    steps = tirx.transform
    passes = [
        steps.BindTarget(target.with_host(target)),
        steps.FlattenBuffer(),
        steps.BF16ComputeLegalize(),
        steps.StmtSimplify(),
        steps.BF16StorageLegalize(),
        steps.LowerTVMBuiltin(),
        steps.LowerIntrin(),
    ]
    lowered = tvm.transform.Sequential(passes)(module)
    return tvm.get_global_func("target.build.llvm")(lowered, target)
