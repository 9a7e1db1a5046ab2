"""Makes ``gymnasium.make("opd_env/ToolUse-v0", …)`` work after ``import opd_env``, in whichever order.

Importing gymnasium (and numpy) takes most of the time that ``import opd_env`` may take, so it is not imported
here: when it is there already the environment is registered at once, otherwise as soon as it is imported.

Test it alone: ``pytest tests/test_package.py``
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence

ENV_ID = "opd_env/ToolUse-v0"


def register_with_gymnasium() -> None:
    """Registers the environment now, or when gymnasium is imported."""
    if "gymnasium" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    from gymnasium.envs.registration import register, registry

    if ENV_ID not in registry:
        register(id=ENV_ID, entry_point="opd_env.episode.env:ToolEnv")


class _Watcher(importlib.abc.MetaPathFinder):
    """Waits for the import of gymnasium, lets it happen as ever, and registers the environment after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "gymnasium":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("gymnasium")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: types.ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
