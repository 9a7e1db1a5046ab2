"""The interpreter on the far side: how a bare one is started, which packages it may import, what it has loaded.

A zygote that has loaded more takes longer to fork from, so there is one for each tier, and a program gets
the smallest that has what it names.

Worked example::

    subprocess.Popen([*guest_command("unsafe_main"), "program", "3"], env=guest_environment("/"))
    tier_of("import numpy as np")       # Tier.NUMPY

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_python.py``
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

# Stand-ins for the parent packages, so that absolute imports find the guest package and run nothing of ours
# or of anybody's site-packages. They are gone again before any code runs.
_BOOT = """
import sys, types
parents = "opd_env", "opd_env.tools", "opd_env.tools.sandbox"
for name in parents:
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{folder!r}] if name == parents[-1] else []
from opd_env.tools.sandbox.guest.{module} import main
for name in parents:
    del sys.modules[name]
main(sys.argv[1:])
"""


def guest_command(module: str) -> list[str]:
    """Command line of an interpreter without site-packages that calls ``main`` of a guest module.

    Not ``-I``, which would ignore PYTHONHASHSEED: ``-P -s`` and an environment of our own are the rest of it.
    """
    code = _BOOT.format(folder=str(Path(__file__).resolve().parent), module=module)
    return [os.path.realpath(sys.executable), "-P", "-s", "-S", "-B", "-c", code]


def guest_environment(home: str) -> dict[str, str]:
    """The whole environment of untrusted code: nothing of the trainer's, and the same on every machine."""
    return {
        "PYTHONHASHSEED": "0",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "HOME": home,
        "TMPDIR": home,
        # One thread for BLAS: faster for small arrays, and sums in a fixed order.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # Without this glibc reserves 64 MB of address space for every thread.
        "GLIBC_TUNABLES": "glibc.malloc.arena_max=2",
    }


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
