"""The two decorators of the plugin interface; a plugin needs `from graphopt.markers import hookimpl`."""

from __future__ import annotations

import pluggy

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("graphopt")
hookimpl = pluggy.HookimplMarker("graphopt")
