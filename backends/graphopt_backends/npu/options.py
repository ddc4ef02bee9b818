"""What a user can ask of a build for an NPU: `npu:ethos-u55-128{memory_mode=Sram_Only optimise=Size}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graphopt.backend_base import BuildOptions
from graphopt.options import opt

__all__ = ["NpuOptions", "options_of"]


@dataclass(frozen=True, kw_only=True)
class NpuOptions:
    """Options of all NPU targets; those that Vela has are called as it calls them."""

    system_config: str | None = opt(
        None, help="clock and memories of the system, by their name in vela.ini; none: those of a common system"
    )
    memory_mode: str | None = opt(
        None, help="what lies in which memory, by its name in vela.ini; none: the usual mode that fits the system"
    )
    config: str | None = opt(None, help="vela.ini file of your own, for names that Vela's file does not have")
    optimise: Literal["Performance", "Size"] = opt("Performance", help="be fast, or use little fast memory")
    arena_cache_size: int | None = opt(None, help="bytes of fast memory to use; none: what the memory mode says", ge=0)
    host: Literal[
        "c", "onnxruntime", "cortex-a76", "cortex-a53", "cortex-a55", "cortex-a72", "cortex-a710", "cortex-a78",
        "neoverse-n1", "neoverse-v1", "android", "armv7",
    ] = opt("c", help="what runs the rest: C99, libraries for an Arm CPU, or models for ONNX Runtime")  # fmt: skip
    require: bool = opt(False, help="fail if an operator cannot run on the NPU, as --require-npu")


def options_of(options: BuildOptions) -> NpuOptions:
    """The options of a build; all as by default where it was asked for without any."""
    return options.target if isinstance(options.target, NpuOptions) else NpuOptions()
