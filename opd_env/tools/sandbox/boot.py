"""The command that starts a bare interpreter with the guest package, and nothing else of opd_env, in it.

Worked example::

    subprocess.Popen([*guest_command("unsafe_main"), "program", "3"], env=guest_environment("/"))

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_unsafe.py``
"""

from __future__ import annotations

import os
import sys
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
