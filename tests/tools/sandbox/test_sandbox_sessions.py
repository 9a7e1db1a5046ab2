"""Sessions of the kernel sandbox: state stays, time stops between cells, and a lie is not believed."""

import time

import pytest

from opd_env.tools.sandbox import Limits, SandboxUnavailable, SessionEnded, Status, open_sandbox


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def sandbox(request):
    try:
        with open_sandbox(request.param, slots=2) as sandbox:
            yield sandbox
    except SandboxUnavailable as error:
        pytest.skip(error.reason)


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
        before = int(session.run("n").output)
        time.sleep(0.5)
        after = int(session.run("n").output)
        running = int(session.run("m = n; time.sleep(0.25); n - m").output)
        assert after - before < running


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
    with sandbox.session(limits=Limits(wall_s=0.4)) as session:
        session.run("x = 1")
        assert session.run(cell).status is status
        assert not session.alive
        with pytest.raises(SessionEnded, match="open a new one"):
            session.run("x")


def test_cpu_time_is_measured_from_outside(sandbox):
    with sandbox.session(limits=Limits(cpu_s=1, wall_s=20)) as session:
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
