"""The public face of a room: names that are imported when they are first used (PEP 562).

``import opd_env`` and ``opd-env --help`` stay quick, because a face imports nothing of its room::

    __getattr__, __dir__, __all__ = lazy_face(__name__, {"env": ("ToolEnv",), "limits": ("RolloutLimits",)})

Beside it, the same imports stand under ``if TYPE_CHECKING:``, where type checkers and editors read them.

Test it alone: ``pytest tests/test_package.py``
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_face(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    Args:
        package: its ``__name__``.
        homes: modules below it, and the public names that each holds.
    """
    module_of = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    extra = [name for name in ("__version__",) if name in vars(sys.modules[package])]
    return get, lambda: sorted([*module_of, *extra]), sorted(module_of)
