"""Fails when it is imported, as a plugin does whose dependency is gone."""

import a_module_that_is_not_installed  # noqa: F401
