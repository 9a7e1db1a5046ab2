"""The python tool: answers, typed errors, a refusal that says why, and state for an episode."""

import os

import pytest

from opd_env.tools import Toolbox, ToolError, ToolErrorKind, get_tool
from opd_env.tools.builtin import python as python_module
from opd_env.tools.builtin.python import Repl, python_tool
from opd_env.tools.sandbox import Level, Limits, SandboxUnavailable, open_sandbox


@pytest.fixture(scope="module")
def sandbox():
    with open_sandbox("unsafe_subprocess", limits=Limits(wall_s=1.0)) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def python(sandbox):
    return python_tool(sandbox=sandbox)


def test_a_program_answers_what_it_prints(python):
    assert python(code="print(6 * 7)") == "42\n"


def test_a_program_that_prints_nothing_is_told_how_to(python):
    assert "use print" in python(code="6 * 7")


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("1/0", ToolErrorKind.EXCEPTION, "ZeroDivisionError"),
        ("print('before')\nwhile True: pass", ToolErrorKind.TIMEOUT, "before"),
        ("while True: print('x' * 1000)", ToolErrorKind.OUTPUT_LIMIT, "too much output"),
        ("import os; os.abort()", ToolErrorKind.EXCEPTION, "died"),
    ],
)
def test_every_failure_is_a_typed_error_with_the_output_so_far(python, code, kind, words):
    with pytest.raises(ToolError) as caught:
        python(code=code)
    assert caught.value.kind is kind
    assert words in caught.value.message


def test_long_output_is_cut_with_a_marker(python):
    answer = python(code="print('x' * 20000)")
    assert len(answer) < 4200
    assert "characters cut" in answer


def test_a_machine_without_a_sandbox_refuses_and_says_why(monkeypatch):
    def refuse():
        raise SandboxUnavailable("There is no kernel here.", "Use Linux.")

    monkeypatch.setattr(python_module, "open_sandbox", refuse)
    monkeypatch.setattr(python_module, "_shared", {})
    with pytest.raises(ToolError) as caught:
        python_tool()(code="print(1)")
    assert caught.value.kind is ToolErrorKind.SANDBOX
    assert "no kernel here" in caught.value.message
    assert "Use Linux" in caught.value.message


def test_a_full_or_closed_sandbox_is_not_held_against_the_student():
    try:
        opened = open_sandbox(max_sessions=1)
    except SandboxUnavailable as error:
        pytest.skip(error.reason)
    with opened as sandbox:
        first, second = Repl(lambda: sandbox), Repl(lambda: sandbox)
        assert first.run("1 + 1") == "2\n"
        with pytest.raises(ToolError, match="1 sessions are open") as caught:
            second.run("1 + 1")
        assert caught.value.kind is ToolErrorKind.SANDBOX
        first.close()
        assert second.run("1 + 1") == "2\n"
        second.close()
    for tool in (python_tool(sandbox=sandbox), python_tool(stateful=True, sandbox=sandbox)):
        assert Toolbox([tool]).call("python", {"code": "print(1)"}).error is ToolErrorKind.SANDBOX


def test_files_are_there_for_each_program_anew_and_the_student_is_told(sandbox):
    tool = python_tool(files={"prices.csv": b"pen,1.5"}, sandbox=sandbox)
    assert tool.description.endswith("Files in its folder: prices.csv.")
    read = "print(open('prices.csv').read())"
    assert tool(code=f"{read}\nopen('prices.csv', 'w').write('spoilt')") == "pen,1.5\n"
    assert tool(code=read) == "pen,1.5\n"


@pytest.mark.parametrize("options", [{"stateful": True, "files": {"a": b""}}, {"files": {"../a": b""}}])
def test_files_that_cannot_be_given_are_refused(options):
    with pytest.raises(ValueError, match=r"single programs only|plain file name"):
        python_tool(**options)


def test_files_without_a_folder_are_refused_before_the_first_call():
    class Landlock:
        level = Level.LANDLOCK

    with (
        Toolbox([python_tool(files={"a": b""}, sandbox=Landlock())]) as toolbox,
        pytest.raises(SandboxUnavailable, match="no folder"),
    ):
        toolbox.sandbox_levels()


def test_a_repl_keeps_variables_and_says_when_they_are_lost(sandbox):
    repl = Repl(lambda: sandbox)
    repl.run("x = 41")
    assert repl.run("x + 1") == "42\n"
    with pytest.raises(ToolError) as caught:
        repl.run("while True: pass")
    assert caught.value.kind is ToolErrorKind.TIMEOUT
    assert "variables and imports are lost" in caught.value.message
    with pytest.raises(ToolError, match="NameError"):
        repl.run("x")
    repl.close()


def test_the_stateful_tool_takes_its_state_from_the_toolbox_not_from_the_student(sandbox):
    tool = python_tool(stateful=True, sandbox=sandbox)
    assert list(tool.parameters["properties"]) == ["code"]
    state = tool.state()
    tool.function(code="y = 2", state=state)
    assert tool.function(code="y", state=state) == "2\n"
    state.close()


def kernel_sandbox_or_skip():
    try:
        open_sandbox().close()
    except SandboxUnavailable as error:
        pytest.skip(error.reason)


def test_by_name_in_a_toolbox_it_runs_in_the_kernel_sandbox():
    kernel_sandbox_or_skip()
    with Toolbox(["python"]) as toolbox:
        assert toolbox.call("python", {"code": "print(6 * 7)"}).content == "42\n"
        result = toolbox.call("python", {"code": "open('/etc/passwd')"})
        assert result.error is ToolErrorKind.EXCEPTION
        assert toolbox.call("python", {}).error is ToolErrorKind.SCHEMA
    if python_module.shared_sandbox().level == "namespaces":
        with Toolbox([get_tool("python", files={"a.txt": b"here"})]) as toolbox:
            assert toolbox.call("python", {"code": "print(open('a.txt').read())"}).content == "here\n"
    assert python_module.shared_sandbox().level in ("namespaces", "landlock")


def test_state_is_the_episodes_own():
    kernel_sandbox_or_skip()
    with Toolbox([get_tool("python", stateful=True)]) as toolbox:
        toolbox.call("python", {"code": "x = 5"})
        assert toolbox.call("python", {"code": "x"}).content == "5\n"
        toolbox.reset()
        assert "NameError" in toolbox.call("python", {"code": "x"}).content


def test_a_fork_opens_a_sandbox_of_its_own():
    kernel_sandbox_or_skip()
    repl = Repl(python_module.shared_sandbox)
    repl.run("x = 1")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, python_tool()(code="print('child')").encode())
            repl.close()  # must leave the parent's process alone
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    assert os.read(reading, 100) == b"child\n"
    os.close(reading)
    assert repl.run("x") == "1\n"
    repl.close()
