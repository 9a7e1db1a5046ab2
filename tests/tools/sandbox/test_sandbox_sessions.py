"""Sessions of the kernel sandbox: state stays, time stops between cells, and a lie is not believed."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sandbox_harness import eventually

from opd_env.tools.sandbox import Limits, SandboxUnavailable, SessionEnded, Status, open_sandbox


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def sandbox(request):
    try:
        with open_sandbox(request.param, slots=2) as sandbox:
            yield sandbox
    except SandboxUnavailable as error:
        pytest.skip(error.reason)


def stands_still(session):
    """Whether it used no CPU for a while: a thread that the stop has not reached yet is given the time."""

    def unchanged():
        before = session._process._cpu_s()
        time.sleep(0.3)
        return session._process._cpu_s() == before

    return eventually(unchanged)


def test_variables_imports_and_functions_stay_and_the_last_value_is_shown(sandbox):
    with sandbox.session() as session:
        session.run("import math\ndef area(r):\n    return math.pi * r ** 2\nr = 2")
        assert session.run("round(area(r), 2)").output == "12.57\n"
        assert session.run("None").output == ""
        assert session.run("print('a'); 'b'").output == "a\n'b'\n"


def test_an_error_keeps_the_state_and_shows_the_line(sandbox):
    with sandbox.session() as session:
        session.run("x = 1")
        result = session.run("y = 2\nx / 0")
        assert result.status is Status.ERROR
        assert "x / 0" in result.output
        assert session.run("x + y").output == "3\n"
        assert session.run("x = (").status is Status.ERROR
        assert session.run("x").output == "1\n"


def test_sessions_do_not_see_each_other(sandbox):
    with sandbox.session() as first, sandbox.session() as second:
        first.run("x = 1\nimport builtins\nbuiltins.secret = 7")
        result = second.run("import builtins\n[hasattr(builtins, 'secret'), 'x' in globals()]")
        assert result.output == "[False, False]\n"


def test_threads_stand_still_between_cells(sandbox):
    with sandbox.session() as session:
        session.run(
            "import threading, time\nn = 0\ndef count():\n    global n\n    while True:\n        n += 1\n"
            "threading.Thread(target=count, daemon=True).start()"
        )
        assert stands_still(session)
        assert session.run("m = n\nwhile n == m: time.sleep(0.01)\nprint('counts')").output == "counts\n"
        assert stands_still(session)


@pytest.mark.parametrize(
    "loop",
    [
        "while True: kill(process, signal.SIGCONT)",
        "while True: syscall((234, 131)[aarch64], process, threading.get_native_id(), signal.SIGCONT)",
        "while True: pass",
    ],
)
def test_a_frozen_process_cannot_wake_itself(sandbox, loop):
    """Neither by threads that cancel the stop while it comes, nor by a timer of the kernel."""
    cell = f"""
import ctypes, os, platform, signal, struct, threading
libc, process, aarch64 = ctypes.CDLL(None), os.getpid(), platform.machine() == "aarch64"
kill, syscall, timer = libc.kill, libc.syscall, ctypes.c_int()
event = struct.pack("<qii48x", 0, signal.SIGCONT, 0)
if syscall((222, 107)[aarch64], 1, event, ctypes.byref(timer)) == 0:
    syscall((223, 110)[aarch64], timer.value, 0, struct.pack("<4q", 0, 10**6, 0, 10**6), 0)
def loop():
    {loop}
for _ in range(4):
    threading.Thread(target=loop, daemon=True).start()
"""
    with sandbox.session() as session:
        session.run(cell)
        assert stands_still(session)
        assert session.run("1").output == "1\n"


def test_sessions_of_one_user_cannot_reach_each_other(sandbox):
    with sandbox.session() as first, sandbox.session() as second:
        process = int(first.run("import os; os.getpid()").output)
        result = second.run(f"""
import os, signal
def attempt(what, action):
    try:
        action()
    except OSError:
        return
    if {process} != os.getpid():        # in namespaces the numbers are the same, and mean oneself
        print("ESCAPED", what)
attempt("signal", lambda: os.kill({process}, 0))
for number in (1, 2, 3):
    attempt("descriptor", lambda: os.open(f"/proc/{process}/fd/{{number}}", os.O_WRONLY))
for name in ("mem", "maps", "environ", "cmdline", "stat", "root", "cwd/x"):
    attempt(name, lambda: os.open(f"/proc/{process}/{{name}}", os.O_RDONLY))
""")
        assert (result.status, result.output) == (Status.OK, "")
        assert first.run("7").output == "7\n"


@pytest.mark.parametrize(
    ("cell", "status"),
    [
        ("while True: pass", Status.TIMEOUT),
        ("import time; time.sleep(9)", Status.TIMEOUT),
        ("while True: print('x' * 1000)", Status.OUTPUT_LIMIT),
        ("import ctypes; ctypes.string_at(0)", Status.KILLED),
        ("import os; os._exit(0)", Status.KILLED),
        ("raise SystemExit(3)", Status.OK),
    ],
)
def test_a_cell_that_ends_the_process_says_so_and_the_next_is_refused(sandbox, cell, status):
    with sandbox.session(limits=Limits(wall_s=1.0)) as session:
        session.run("x = 1")
        assert session.run(cell).status is status
        assert not session.alive
        with pytest.raises(SessionEnded, match="open a new one"):
            session.run("x")


def test_cpu_time_is_measured_from_outside(sandbox):
    with sandbox.session(limits=Limits(cpu_s=1, wall_s=100)) as session:
        assert session.run("while True: pass").status is Status.CPU_LIMIT
        assert not session.alive


def test_an_answer_to_a_cell_that_was_not_asked_is_not_believed(sandbox):
    with sandbox.session() as session:
        session.run("import os, struct")
        assert session.run("os.write(3, struct.pack('<IB', 7, 0))").status is Status.KILLED
    with sandbox.session() as session:
        session.run("import os, struct")
        session.run("os.write(3, struct.pack('<IB', 2, 0))")  # its own number: the true answer is one too many
        assert session.run("print('real')").status is Status.KILLED
        assert not session.alive


def test_limits_of_the_session_hold(sandbox):
    with sandbox.session(limits=Limits(session_cells=2)) as session:
        session.run("1")
        session.run("2")
        with pytest.raises(SessionEnded):
            session.run("3")
    with sandbox.session(limits=Limits(session_s=0.05)) as session:
        time.sleep(0.06)
        with pytest.raises(SessionEnded):
            session.run("1")


def test_numpy_can_be_imported_late(sandbox):
    pytest.importorskip("numpy")
    with sandbox.session() as session:
        session.run("x = 3")
        assert session.run("import numpy as np\nint(np.arange(4).sum()) * x").output == "18\n"


def test_the_same_session_gives_the_same_answers(sandbox):
    cells = ["import random\nrandom.random()", "hash('a'), {'x', 'y', 'z'}", "object()"]

    def play(seed):
        with sandbox.session(seed=seed) as session:
            return [session.run(cell).output for cell in cells]

    assert play(0) == play(0)
    assert play(0) != play(1)


def test_many_sessions_at_once(sandbox):
    sessions = [sandbox.session() for _ in range(20)]
    for number, session in enumerate(sessions):
        session.run(f"x = {number}")
    assert [session.run("x").output for session in sessions] == [f"{n}\n" for n in range(20)]
    for session in sessions:
        session.close()
