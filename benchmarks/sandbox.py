"""What one call of the code sandbox costs, beside a plain subprocess and a bubblewrap per call.

    python benchmarks/sandbox.py                    # calls/s of every level and tier, ratios to bwrap
    python benchmarks/sandbox.py --soak 10000       # many calls: processes, descriptors and memory must not grow

All are measured in turns, in the same run, one call at a time; the median of the rounds counts. bwrap is
left out where it is not installed (Debian, Ubuntu: ``apt-get install bubblewrap``).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from opd_env.tools.sandbox import Limits, Sandbox, SandboxUnavailable, Status, open_sandbox

HELLO = "print(1 + 1)"
NUMPY = "import numpy as np\nprint(np.arange(3).sum())"
SYMPY = "import sympy\nprint(sympy.Integer(1) + 1)"


def subprocess_call(prefix: list[str]) -> Callable[[], None]:
    """One interpreter per call."""
    python = [os.path.realpath(sys.executable), "-I", "-S", "-c", HELLO]

    def call() -> None:
        done = subprocess.run([*prefix, *python], capture_output=True, check=True, env={})
        if done.stdout != b"2\n":
            raise RuntimeError(f"expected 2, got {done.stdout!r}")

    return call


def sandbox_call(sandbox: Sandbox, code: str) -> Callable[[], None]:
    """One program per call."""

    def call() -> None:
        result = sandbox.run(code)
        if result.status is not Status.OK:
            raise RuntimeError(f"the call failed: {result}")

    return call


def candidates(stack: ExitStack) -> dict[str, Callable[[], None]]:
    """Everything that is measured, by name."""
    found = {"plain python -I -S": subprocess_call([])}
    bwrap = shutil.which("bwrap")
    if bwrap:
        options = "--unshare-all --die-with-parent --new-session --ro-bind / / --tmpfs /tmp --dev /dev --proc /proc"
        found["bwrap per call"] = subprocess_call([bwrap, *options.split()])
    for level in ("namespaces", "landlock"):
        try:
            sandbox = stack.enter_context(open_sandbox(level, slots=1))
        except SandboxUnavailable as error:
            print(f"{level}: {error.reason}")
            continue
        for tier, code in (("stdlib", HELLO), ("numpy", NUMPY), ("sympy", SYMPY)):
            found[f"{level}, {tier}"] = sandbox_call(sandbox, code)
        session = stack.enter_context(sandbox.session(limits=Limits(session_cells=10**9, session_s=10**6)))
        found[f"{level}, session turn"] = lambda session=session: session.run(HELLO)
    return found


def compare(rounds: int, seconds: float) -> None:
    """Prints the table."""
    with ExitStack() as stack:
        calls = candidates(stack)
        for call in calls.values():
            call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                count, start = 0, time.perf_counter()
                while (elapsed := time.perf_counter() - start) < seconds:
                    call()
                    count += 1
                times[name].append(elapsed / count)
    medians = {name: statistics.median(values) for name, values in times.items()}
    load = os.getloadavg()[0]
    print(f"Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} CPUs, load {load:.1f}")
    print("| | ms per call | calls/s | times bwrap |\n|---|---|---|---|")
    for name, value in medians.items():
        ratio = f"{medians['bwrap per call'] / value:.1f}" if "bwrap per call" in medians else ""
        print(f"| {name} | {value * 1000:.2f} | {1 / value:,.0f} | {ratio} |")


def soak(calls: int) -> None:
    """Prints processes, descriptors, threads and memory as the calls go on."""
    codes = [HELLO, "1/0", "import os; os._exit(3)", "x = bytearray(50 << 20)", "print('z' * 5000)"]
    with open_sandbox(slots=2) as sandbox:
        print(f"level {sandbox.level}")
        print("| calls | processes | descriptors | threads | resident MB | calls/s |\n|---|---|---|---|---|---|")
        start = time.perf_counter()
        for number in range(calls + 1):
            if number % max(1, calls // 10) == 0:
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
                processes = sum(name.isdigit() for name in os.listdir("/proc"))
                descriptors = len(os.listdir("/proc/self/fd"))
                rate = number / (time.perf_counter() - start)
                print(
                    f"| {number} | {processes} | {descriptors} | {threading.active_count()} | {resident:.1f} "
                    f"| {rate:.0f} |", flush=True,
                )  # fmt: skip
            if sandbox.run(codes[number % len(codes)]).status is Status.SANDBOX_ERROR:
                raise RuntimeError(f"call {number} failed")
            if number % 100 == 0:
                with sandbox.session() as session:
                    session.run("x = 1")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="per candidate and round")
    parser.add_argument("--soak", type=int, default=0, metavar="CALLS")
    arguments = parser.parse_args()
    if arguments.soak:
        soak(arguments.soak)
    else:
        compare(arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
