"""The unsafe subprocess: no wall, but its limits, results and clean-up hold."""

import asyncio
import logging
import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sandbox_harness import descriptors, eventually

from opd_env.tools.sandbox import Level, Limits, SessionEnded, Status, open_sandbox


@pytest.fixture(scope="module")
def sandbox():
    with open_sandbox("unsafe_subprocess") as sandbox:
        yield sandbox


def test_it_warns_and_says_its_level(caplog):
    with caplog.at_level(logging.WARNING), open_sandbox("unsafe_subprocess") as sandbox:
        assert sandbox.level is Level.NONE
    assert "WITHOUT a sandbox" in caplog.text


def test_a_program_runs_with_its_files_and_without_our_environment(sandbox, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret")
    result = sandbox.run("import os; print(open('a.txt').read(), os.environ)", files={"a.txt": b"hello"})
    assert result.status is Status.OK
    assert result.output.startswith("hello")
    assert "secret" not in result.output


@pytest.mark.parametrize(
    ("code", "status", "exit_code"),
    [
        ("1/0", Status.ERROR, 1),
        ("import sys; sys.exit(3)", Status.ERROR, 3),
        ("x = (", Status.ERROR, 1),
        ("import os; os.kill(os.getpid(), 11)", Status.KILLED, -11),
        ("import os; os._exit(0)", Status.OK, 0),
        ("print('x' * 10**6)", Status.OUTPUT_LIMIT, None),
        ("while True: pass", Status.TIMEOUT, None),
        ("import signal; signal.pause()", Status.TIMEOUT, None),
    ],
)
def test_every_end_has_its_status(sandbox, code, status, exit_code):
    result = sandbox.run(code, limits=Limits(wall_s=0.5 if status is Status.TIMEOUT else 60.0))
    assert result.status is status
    if exit_code is not None:
        assert result.exit_code == exit_code


def test_what_was_printed_before_a_time_out_is_kept(sandbox):
    result = sandbox.run("print('first')\nwhile True: pass", limits=Limits(wall_s=2.0))
    assert (result.status, result.output) == (Status.TIMEOUT, "first\n")


def test_tracebacks_show_the_users_lines_only(sandbox):
    output = sandbox.run("def f():\n    return 1 / 0\nf()").output
    assert "return 1 / 0" in output
    assert "runner" not in output


def test_a_session_keeps_its_state_and_echoes_the_last_value(sandbox):
    with sandbox.session() as session:
        assert session.run("x = 41").output == ""
        assert session.run("x + 1").output == "42\n"
        assert session.run("1/0").status is Status.ERROR
        assert session.run("print(x)").output == "41\n"


def test_a_time_out_ends_the_session(sandbox):
    with sandbox.session(limits=Limits(wall_s=0.5)) as session:
        assert session.run("while True: pass").status is Status.TIMEOUT
        assert not session.alive
        with pytest.raises(SessionEnded):
            session.run("1")


def test_exit_in_a_session_ends_it(sandbox):
    with sandbox.session() as session:
        session.run("raise SystemExit(3)")
        assert not session.alive


def test_arun_runs_many_at_once(sandbox):
    async def many():
        return await asyncio.gather(*(sandbox.arun(f"print({i})") for i in range(4)))

    assert [result.output for result in asyncio.run(many())] == [f"{i}\n" for i in range(4)]


def test_nothing_is_left_behind(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    proc = Path("/proc/self/fd").exists()
    before = descriptors() if proc else set()
    for _ in range(3):
        sandbox.run("open('a', 'w').write('x')")
        with sandbox.session() as session:
            session.run("1")
            assert os.listdir(tmp_path)
    assert not proc or eventually(lambda: descriptors() <= before), descriptors() - before
    assert not os.listdir(tmp_path)


def test_the_same_program_prints_the_same(sandbox):
    code = "import random; print(random.random(), hash('a'), object(), {'b', 'a', 'c'})"
    assert sandbox.run(code).output == sandbox.run(code).output
    assert sandbox.run(code, seed=1).output != sandbox.run(code).output
