"""Which installed packages the code may import, and which of them are loaded before it starts.

A zygote that has loaded more takes longer to fork from, so there is one for each tier, and a program gets
the smallest that has what it names.

Worked example::

    tier_of("import numpy as np")       # Tier.NUMPY
    tier_of("print(1)")                 # Tier.STDLIB

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_python.py``
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from dataclasses import dataclass
from enum import StrEnum

_PACKAGES = ("numpy", "sympy", "mpmath")
_NAMES = re.compile(r"\b(numpy|sympy|mpmath)\b")


class Tier(StrEnum):
    """What is loaded already."""

    STDLIB = "stdlib"
    NUMPY = "numpy"
    SYMPY = "sympy"
    """numpy and sympy."""


_PRELOADED = {
    Tier.STDLIB: [],
    Tier.NUMPY: ["numpy", "numpy.random", "numpy.linalg", "numpy.fft", "numpy.polynomial"],
    Tier.SYMPY: ["sympy", "mpmath"],
}


def tier_of(code: str) -> Tier:
    """The smallest tier that has what the code names."""
    named = set(_NAMES.findall(code))
    if named & {"sympy", "mpmath"}:
        return Tier.SYMPY
    return Tier.NUMPY if "numpy" in named else Tier.STDLIB


@dataclass(frozen=True)
class Installed:
    """The packages that are installed here, of those that code may import."""

    folders: dict[str, str]
    """Folder by import name."""
    libraries: list[str]
    """Folders of shared libraries that lie beside them."""

    def preloaded(self, tier: Tier) -> list[str]:
        """Modules to import for a tier: those that are there."""
        names = list(_PRELOADED[tier])
        if tier is Tier.SYMPY:
            names = _PRELOADED[Tier.NUMPY] + names
        return [name for name in names if name.split(".")[0] in self.folders]


@functools.cache
def installed_packages() -> Installed:
    """Looks them up without importing them."""
    folders, libraries = {}, []
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            continue
        folder = os.path.realpath(spec.submodule_search_locations[0])
        folders[name] = folder
        if os.path.isdir(f"{folder}.libs"):
            libraries.append(f"{folder}.libs")
    return Installed(folders, libraries)
