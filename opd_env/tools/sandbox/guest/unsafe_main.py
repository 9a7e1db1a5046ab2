"""What the unsafe subprocess runs: rlimits, then the code. There is no wall here.

Arguments: "program" or "session", a descriptor (the code, or the channel of the session), the seed,
seconds of CPU, bytes of address space to add.
"""

from __future__ import annotations

import os
import resource
import sys

from opd_env.tools.sandbox.guest import runner


def main(arguments: list[str]) -> None:
    """Runs what the descriptor holds, and exits."""
    kind = arguments[0]
    descriptor, seed, cpu_s, memory_bytes = (int(argument) for argument in arguments[1:])

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, 16 << 20))
        if sys.platform == "linux":
            with open("/proc/self/statm") as statm:
                mapped = int(statm.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, mapped + memory_bytes))

    if kind == "session":
        os._exit(runner.run_cells(descriptor, seed, runner.prepare(), limit))
    with os.fdopen(descriptor, "rb") as file:
        code = file.read().decode("utf-8", "surrogatepass")
    os._exit(runner.run_program(code, seed, runner.prepare(), limit))
