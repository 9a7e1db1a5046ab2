"""Which sandbox is opened, and what is said where none works."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile

import pytest

from opd_env.tools.sandbox import ExecResult, Level, SandboxUnavailable, Status, open_sandbox, opening
from opd_env.tools.sandbox.base import NOBODY, SetUpFailed
from opd_env.tools.sandbox.selftest import _ATTACKS, Canaries, self_test


class Opened:
    """Stands for a kernel sandbox that was opened."""

    def __init__(self, level):
        self.level = level


def only(*working):
    """An ``_open_level`` for a machine where only these levels work."""

    def open_level(level, limits, slots, max_sessions):
        if level not in working:
            raise SetUpFailed("unshare: not permitted")
        return Opened(level)

    return open_level


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'namespaces'"):
        open_sandbox("namespace")
    with pytest.raises(ValueError, match="min_level"):
        open_sandbox("auto", min_level="none")


@pytest.fixture
def linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.mark.usefixtures("linux")
def test_auto_takes_the_strongest_level_that_works(monkeypatch):
    monkeypatch.setattr(opening, "_open_level", only(Level.NAMESPACES, Level.LANDLOCK))
    assert open_sandbox().level is Level.NAMESPACES
    monkeypatch.setattr(opening, "_open_level", only(Level.LANDLOCK))
    assert open_sandbox().level is Level.LANDLOCK


@pytest.mark.usefixtures("linux")
def test_nothing_is_silently_weaker_than_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(opening, "_open_level", only(Level.LANDLOCK))
    for arguments in ({"kind": "namespaces"}, {"min_level": "namespaces"}):
        with pytest.raises(SandboxUnavailable) as caught:
            open_sandbox(**arguments)
        assert "landlock" not in caught.value.reason
    monkeypatch.setattr(opening, "_open_level", only())
    with pytest.raises(SandboxUnavailable) as caught:
        open_sandbox()
    assert "namespaces: unshare: not permitted" in caught.value.reason
    assert "landlock: unshare: not permitted" in caught.value.reason
    assert "user.max_user_namespaces" in caught.value.how_to_fix
    assert "unsafe_subprocess" in caught.value.how_to_fix


@pytest.mark.parametrize(
    ("system", "machine", "words"), [("darwin", "arm64", "needs Linux"), ("linux", "riscv64", "no table")]
)
def test_other_systems_and_architectures_are_refused_with_the_reason(monkeypatch, system, machine, words):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for kind in ("auto", "namespaces", "landlock"):
        with pytest.raises(SandboxUnavailable, match=words):
            open_sandbox(kind)


def test_importing_the_package_touches_no_system_calls():
    """So that other systems can import it."""
    code = (
        "import sys, opd_env.tools.sandbox, opd_env.tools.builtin.python\n"
        "print([name for name in sys.modules if name.endswith(('guest.linux', 'guest.zygote', 'ctypes'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert "guest" not in done.stdout
    assert done.returncode == 0, done.stderr


class Answers:
    """A sandbox that answers every program the same."""

    def __init__(self, status, output):
        self.result = ExecResult(status, output, 0, False, 0.0, 0.0, 0)

    def run(self, code, **options):
        return self.result


def test_the_self_test_believes_neither_an_escape_nor_silence_nor_a_failure():
    for answers in (
        Answers(Status.OK, "ESCAPED\nheld\n"),
        Answers(Status.OK, ""),
        Answers(Status.ERROR, "held\n"),
        Answers(Status.SANDBOX_ERROR, ""),
    ):
        failures = self_test(answers, NOBODY)
        assert all(any(failure.startswith(name) for failure in failures) for name in _ATTACKS)


def test_the_self_test_sees_a_canary_that_was_touched():
    class Touches(Answers):
        def run(self, code, **options):
            facts = code.split("VISIBLE = ", 1)
            if len(facts) == 2:
                own = eval(facts[1].split("\n")[0])[1]
                os.utime(own, (0, 0))
            return self.result

    assert any("canary touched" in failure for failure in self_test(Touches(Status.OK, "held\n"), NOBODY))


def test_canaries_notice_every_touch():
    import socket

    with Canaries(NOBODY) as canaries:
        assert canaries.touched() == []
        os.chmod(canaries.own, 0o600)
        with socket.create_connection(("127.0.0.1", canaries.tcp_port)), socket.socket(socket.AF_UNIX) as stream:
            stream.connect("\0" + canaries.abstract)
            found = " ".join(canaries.touched())
        assert "files" in found
        assert "TCP" in found
        assert "abstract stream" in found
    assert not os.path.exists(canaries.folder)


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_a_sandbox_that_opens_has_passed_its_self_test_and_says_its_level(level, caplog):
    with caplog.at_level("INFO"):
        try:
            sandbox = open_sandbox(level)
        except SandboxUnavailable as error:
            pytest.skip(error.reason)
    with sandbox:
        assert sandbox.level == level
        assert f"level {level}, self-test passed" in caplog.text


def test_a_sandbox_that_fails_its_self_test_is_not_handed_out(monkeypatch):
    try:
        open_sandbox().close()
    except SandboxUnavailable as error:
        pytest.skip(error.reason)
    monkeypatch.setattr(opening, "self_test", lambda sandbox, user: ["network: ok, 'ESCAPED TCP'"])
    with pytest.raises(SandboxUnavailable, match="ESCAPED TCP"):
        open_sandbox()


def test_without_a_folder_for_canaries_it_is_refused_with_the_reason(monkeypatch):
    try:
        open_sandbox().close()
    except SandboxUnavailable as error:
        pytest.skip(error.reason)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(SandboxUnavailable, match=r"canaries.*No space left"):
        open_sandbox()


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_an_environment_in_a_shared_folder_is_no_escape(level):
    """Packages may lie below /tmp or /home: the way to them is seen, their neighbours are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)  # as an environment that other users may read
        shutil.copytree(os.path.dirname(importlib.util.find_spec("mpmath").origin), f"{folder}/mpmath")
        open(f"{folder}/neighbour", "w").close()
        _open_with_packages_in(folder, level)


def _open_with_packages_in(folder, level):
    code = f"""
from opd_env.tools.sandbox import SandboxUnavailable, open_sandbox
try:
    with open_sandbox({level!r}) as sandbox:
        print(sandbox.run("import os; print(os.path.exists({f"{folder}/neighbour"!r}), end='')").output)
except SandboxUnavailable as error:
    print(error)
"""
    path = os.pathsep.join([folder, os.getcwd()])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "list folders" not in done.stdout
    if level == "namespaces" and "False" not in done.stdout:
        pytest.skip(f"{level} does not work here: {done.stdout.strip()}")
