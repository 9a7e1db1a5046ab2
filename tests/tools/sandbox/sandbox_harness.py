"""Runs the attacks of sandbox_attacks.py and sandbox_attacks_from_source.py, and says what was not held.

Also a program: it runs all of them as the user that starts it, and prints the findings as JSON::

    python tests/tools/sandbox/sandbox_harness.py namespaces landlock
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sandbox_attacks import ATTACKS, PRELUDE, Attack
from sandbox_attacks_from_source import ATTACKS_FROM_SOURCE

from opd_env.tools.sandbox import ExecResult, Level, Limits, Status
from opd_env.tools.sandbox.base import NOBODY
from opd_env.tools.sandbox.guest.syscall_table import AUDIT_ARCH
from opd_env.tools.sandbox.kernel import KernelSandbox
from opd_env.tools.sandbox.selftest import Canaries

ALL_ATTACKS = [*ATTACKS, *ATTACKS_FROM_SOURCE]
MODES = ("one-shot", "session")
_DIGEST = hashlib.sha256(b"-4e1b77c0a95d").hexdigest()[:16]


class Harness:
    """A sandbox with one slot, canaries, and a victim process of the user that the code runs as."""

    def __init__(self, level: Level) -> None:
        os.environ["OPD_ENV_CANARY"] = "in the environment"
        self._stack = contextlib.ExitStack()
        self.sandbox = self._stack.enter_context(KernelSandbox(level, slots=1))
        self.canaries = self._stack.enter_context(Canaries(NOBODY))
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        self._mark = f"opd-env-attack-{secrets.token_hex(8)}"
        self.victim = subprocess.Popen(["/bin/sleep", "3600"], start_new_session=True, **user)
        self._stack.callback(self.victim.wait)
        self._stack.callback(self.victim.kill)
        # Bound and kept, so that no other process is given it; an attack that asks for it anyway can have it.
        reserved = self._stack.enter_context(socket.socket())
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        self.free_port = reserved.getsockname()[1]
        self._health()
        self._victim_before = self._victim_state()
        self._processes = Processes(self.sandbox)
        self._processes_before = settled(lambda: len(self._processes()))

    def close(self) -> None:
        self._stack.close()

    def run(self, attack: Attack, mode: str) -> list[str]:
        """Runs one attack; returns what it achieved, in words."""
        problems = []
        result = self._call(self._filled(attack.code, attack.prelude), attack.limits, mode)
        if result.status not in attack.ends:
            problems.append(f"ended with {result.status}: {result.output[-300:]!r}")
        problems += self._traces(result)
        if attack.then:
            result = self._call(self._filled(attack.then, False), attack.limits, mode)
            if result.status not in attack.then_ends:
                problems.append(f"then ended with {result.status}: {result.output[-300:]!r}")
            if attack.then_prints and result.output != attack.then_prints:
                problems.append(f"then printed {result.output[-300:]!r}")
            problems += self._traces(result)
        problems += self._health()
        return problems

    def _call(self, code: str, limits: Limits, mode: str) -> ExecResult:
        keep_files = self.sandbox.level is Level.NAMESPACES  # reading them is attacked by all of these, too
        if mode == "one-shot":
            return self.sandbox.run(code, limits=limits, keep_files=keep_files)
        with self.sandbox.session(limits=limits) as session:
            return session.run(code, keep_files=keep_files)

    def _filled(self, code: str, prelude: bool) -> str:
        canaries = self.canaries
        facts = (
            canaries.secret, canaries.own, canaries.folder, canaries.writable, canaries.abstract, canaries.tcp_port,
            canaries.udp_port, self.free_port, self.victim.pid, os.getpid(),
            list(AUDIT_ARCH).index(platform.machine()),
        )  # fmt: skip
        text = PRELUDE.replace("@FACTS@", repr(facts)) + code if prelude else code
        return text.replace("@DIGEST@", _DIGEST).replace("@MARK@", self._mark)

    def _traces(self, result: ExecResult) -> list[str]:
        problems = [f"canary touched: {what}" for what in self.canaries.touched()]
        if "ESCAPED" in result.output or self.canaries.token in result.output.replace(self.canaries.abstract, ""):
            problems.append(result.output[:500])
        problems += [
            f"file {name!r}: {content[:100]!r}"
            for name, content in result.files.items()
            if self.canaries.token.encode() in content or b"root:" in content or "/" in name
        ]
        if result.status is Status.SANDBOX_ERROR:
            problems.append("the sandbox failed")
        if len(result.output) > 4 * 65_536:  # a byte that is no text becomes four characters
            problems.append(f"{len(result.output)} characters of output")
        if (state := self._victim_state()) != self._victim_before:
            problems.append(f"victim: {state} instead of {self._victim_before}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.free_port)) == 0:
                problems.append("a port was opened")
        for folder in ("/tmp", "/var/tmp", "/dev/shm", "/run", "/", os.path.expanduser("~")):
            if os.path.lexists(f"{folder}/{self._mark}"):
                problems.append(f"a file was made in {folder}")
        return problems

    def _victim_state(self) -> tuple[object, ...]:
        pid = self.victim.pid
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        limits = Path(f"/proc/{pid}/limits").read_text()
        return fields[0], os.getpriority(os.PRIO_PROCESS, pid), sorted(os.sched_getaffinity(pid)), limits

    def _health(self) -> list[str]:
        """A plain call and a plain session work, and nothing is left over."""
        problems = []
        result = self.sandbox.run("print(6 * 7)")
        if (result.status, result.output) != (Status.OK, "42\n"):
            problems.append(f"afterwards a call gave {result}")
        with self.sandbox.session() as session:
            result = session.run("6 * 7")
            if (result.status, result.output) != (Status.OK, "42\n"):
                problems.append(f"afterwards a session gave {result}")
        if hasattr(self, "_processes_before") and not eventually(
            lambda: len(self._processes()) <= self._processes_before
        ):
            problems.append(f"processes left over: {self._processes()}")
        return problems


class Processes:
    """The living processes and zombies of one sandbox, wherever they have gone.

    Those below its zygotes, and those of their sessions: a process keeps its session when its parent dies. Nothing
    that another sandbox, another test or the rest of the machine does is counted. Reading /proc takes a moment, so
    numbers are right when they stand still: compare them by ``eventually``.
    """

    def __init__(self, sandbox: KernelSandbox) -> None:
        self._sandbox = sandbox
        self._sessions: set[int] = set()

    def __call__(self) -> dict[int, str]:
        """Name and state by process number."""
        pool = self._sandbox._pool
        self._sessions |= {zygote._process.pid for zygote in list(pool._zygotes.values())}
        machine: dict[int, tuple[str, int, int]] = {}
        for entry in os.scandir("/proc"):
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{int(entry.name)}/stat") as stat:
                name, rest = stat.read().rsplit(")", 1)
                state, parent, _, session = rest.split()[:4]
                machine[int(entry.name)] = (f"{name.split('(', 1)[1]} {state}", int(parent), int(session))
        found: dict[int, str] = {}
        while True:
            new = {
                process: name
                for process, (name, parent, session) in machine.items()
                if process not in found and (session in self._sessions or parent in found)
            }
            if not new:
                return found
            found |= new
            self._sessions |= {machine[process][2] for process in new}


def descriptors() -> set[str]:
    """What this process holds open, with the number of each."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return found


def eventually(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    """Whether it becomes true: at once on a quiet machine, and on a busy one there is time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def settled(measure: Callable[[], int]) -> int:
    """What is measured, once it has stayed the same for a fifth of a second: a slot forks ahead."""
    value, since = measure(), time.monotonic()
    while time.monotonic() - since < 0.2:
        time.sleep(0.01)
        if (now := measure()) != value:
            value, since = now, time.monotonic()
    return value


def main(levels: list[str]) -> None:
    """All attacks, in both modes, on the given levels."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    found: dict[str, list[str]] = {}
    for level in levels:
        harness = Harness(Level(level))
        for mode in MODES:
            for attack in ALL_ATTACKS:
                found[f"{level}/{mode}/{attack.name}"] = harness.run(attack, mode)
        harness.close()
    print(json.dumps({"user": os.getuid(), "findings": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
