"""Files out of the working folder: what a program wrote comes back, and nothing that it only seems to have written."""

import os
import socket
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from sandbox_harness import descriptors, eventually

from opd_env.tools import Toolbox
from opd_env.tools.builtin.python import python_tool
from opd_env.tools.sandbox import Limits, SandboxUnavailable, Status, open_sandbox
from opd_env.tools.sandbox.read_back import read_folder


@pytest.fixture(scope="module", params=["namespaces", "unsafe_subprocess"])
def sandbox(request):
    try:
        with open_sandbox(request.param, slots=1) as sandbox:
            yield sandbox
    except SandboxUnavailable as error:
        pytest.skip(error.reason)


@pytest.fixture
def landlock():
    try:
        with open_sandbox("landlock", slots=1) as sandbox:
            yield sandbox
    except SandboxUnavailable as error:
        pytest.skip(error.reason)


def read(folder, given=None, **limits):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return read_folder(descriptor, given or {}, Limits(**limits))
    finally:
        os.close(descriptor)


def test_what_a_program_writes_or_changes_comes_back(sandbox):
    code = "open('plot.csv', 'w').write('x,y\\n1,2\\n')\nopen('b', 'wb')\nopen('changed', 'a').write('!')"
    given = {"changed": b"in", "unchanged": b"in"}
    result = sandbox.run(code, files=given, keep_files=True)
    assert result.status is Status.OK, result.output
    assert result.files == {"plot.csv": b"x,y\n1,2\n", "b": b"", "changed": b"in!"}
    assert result.files_omitted == ()
    again = sandbox.run("import os; print(os.listdir())", keep_files=True)
    assert (again.output, again.files) == ("[]\n", {})
    assert sandbox.run(code, files=given).files == {}


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("1 / 0", Status.ERROR),
        ("import os; os._exit(0)", Status.OK),
        ("while True: pass", Status.TIMEOUT),
        ("import os; os.kill(os.getpid(), 9)", Status.KILLED),
        ("while True: print('x' * 1000)", Status.OUTPUT_LIMIT),
    ],
)
def test_they_come_back_however_it_ends(sandbox, ending, status):
    code = f"with open('a', 'w') as file: file.write('kept')\n{ending}"
    result = sandbox.run(code, limits=Limits(wall_s=2.0 if status is Status.TIMEOUT else 60.0), keep_files=True)
    assert (result.status, result.files) == (status, {"a": b"kept"})


def test_files_of_a_session_stay_until_it_ends(sandbox):
    with sandbox.session(limits=Limits(wall_s=2.0)) as session:
        session.run("open('a', 'w').write('1')")
        assert session.run("print(open('a').read())", keep_files=True).files == {"a": b"1"}
        result = session.run("import os; os.rename('a', 'b'); open('c', 'w').write('2'); 1 / 0", keep_files=True)
        assert (result.status, result.files) == (Status.ERROR, {"b": b"1", "c": b"2"})
        assert session.run("1").files == {}
        lost = session.run("while True: pass", keep_files=True)
        assert (lost.status, lost.files) == (Status.TIMEOUT, {"b": b"1", "c": b"2"})
    with sandbox.session() as session:
        assert session.run("import os; os.listdir()", keep_files=True).output == "[]\n"


HOSTILE = """
import os, socket, sys
def quietly(action):
    try:
        action()
    except OSError:
        pass
os.symlink('/etc/passwd', 'link')
os.symlink('good', 'link to a good one')
os.symlink('/proc/self/environ', 'environ')
os.symlink('.', 'loop')
os.mkdir('folder')
open('folder/inner', 'w').write('x')
quietly(lambda: os.mkfifo('fifo'))
quietly(lambda: os.mknod('socket', 0o140666))
for name in (b'new\\nline', b'\\xff\\xfe', b'\\x1b[2J', '\\u202egnp.exe'.encode(), b'tab\\t'):
    open(name, 'w').write('x')
open('..x', 'w').write('dots')
open('x' * 255, 'w').write('long')
with open('sparse', 'wb') as file:
    file.truncate(15 << 20)
open('good', 'w').write('good')
"""


def test_only_plain_files_with_plain_names_come_back(sandbox):
    result = sandbox.run(HOSTILE, keep_files=True)
    assert result.status is Status.OK, result.output
    assert result.files == {"..x": b"dots", "x" * 255: b"long", "good": b"good"}
    reasons = dict(line.split(": ", 1) for line in result.files_omitted)
    assert reasons["folder"] == "a folder"
    assert reasons["sparse"].startswith("15728640 bytes")
    for name in ("link", "link to a good one", "environ", "loop"):
        assert reasons[name].startswith("it cannot be opened")
    for name in (r"'new\nline'", r"'\udcff\udcfe'", r"'\x1b[2J'", r"'\u202egnp.exe'", r"'tab\t'"):
        assert reasons[name] == "its name is no plain text"
    assert all(line.isprintable() for line in result.files_omitted)


def test_number_and_bytes_are_bounded_and_the_rest_is_named(sandbox):
    code = "for n in range(60): open(f'{n:02}', 'w').write('x' * 100)"
    few = sandbox.run(code, keep_files=True, limits=Limits(kept_files=3))
    assert list(few.files) == ["00", "01", "02"]
    assert len(few.files_omitted) == 21
    assert few.files_omitted[0] == "03: only 3 files are kept"
    assert few.files_omitted[-1] == "and 37 more"
    small = sandbox.run(code, keep_files=True, limits=Limits(kept_bytes=250))
    assert list(small.files) == ["00", "01"]
    assert small.files_omitted[0] == "02: 100 bytes, and 50 are left of what is kept"


def test_a_folder_that_nobody_may_enter_harms_nobody(sandbox):
    code = "import os\nopen('a', 'w').write('x')\nos.chmod('a', 0)\nos.chmod('.', 0)"
    assert sandbox.run(code, keep_files=True).status is Status.OK
    assert sandbox.run("import os; print(os.listdir())").output == "[]\n"


def test_pipes_sockets_and_links_are_not_followed_and_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        written = read(tmp_path)
    assert written.files == {}
    assert [line.split(":")[0] for line in written.omitted] == ["fifo", "link", "socket"]


def test_a_file_that_grows_or_is_swapped_while_it_is_read_is_whole_or_left_out(tmp_path):
    path, link = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"x" * 1000)
    ended = threading.Event()

    def change():
        while not ended.is_set():
            for size in (0, 10, 100_000):
                path.write_bytes(b"x" * size)
            link.unlink(missing_ok=True)
            link.symlink_to("/etc/passwd")
            link.unlink()
            link.write_bytes(b"plain")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            for name, content in read(tmp_path).files.items():
                assert set(content) <= {ord("x")} if name == "a" else content in (b"", b"plain")
    finally:
        ended.set()
        thread.join()


@given(contents=st.dictionaries(st.sampled_from("abcdef"), st.binary(max_size=40)), most=st.integers(1, 100))
def test_never_more_than_the_limits(tmp_path_factory, contents, most):
    folder = tmp_path_factory.mktemp("written")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    written = read(folder, kept_files=4, kept_bytes=most)
    assert len(written.files) <= 4
    assert sum(map(len, written.files.values())) <= most
    assert len(written.files) + len(written.omitted) == len(contents)
    assert written.files.items() <= contents.items()
    assert read(folder, contents).files == {}


def test_nothing_stays_open(sandbox):
    def use():
        sandbox.run("open('a', 'w')", keep_files=True)
        sandbox.run("import os; os._exit(1)", keep_files=True)
        with sandbox.session() as session:
            session.run("1", keep_files=True)

    use()
    before = len(descriptors())
    for _ in range(5):
        use()
    assert eventually(lambda: len(descriptors()) <= before), descriptors()


def test_where_there_is_no_folder_it_is_refused(landlock):
    with pytest.raises(ValueError, match="namespaces"):
        landlock.run("1", keep_files=True)
    with landlock.session() as session, pytest.raises(ValueError, match="namespaces"):
        session.run("1", keep_files=True)


@pytest.mark.parametrize("sizes", [[(16 << 20) + 1], [16 << 20, 16 << 20, 1]])
def test_files_that_the_folder_has_no_room_for_are_refused(sandbox, sizes):
    with pytest.raises(ValueError, match=r"files\['\d'\] has"):
        sandbox.run("1", files={str(number): bytes(size) for number, size in enumerate(sizes)})


def test_the_tool_hands_them_over_and_tells_the_student(sandbox):
    got = []
    tool = python_tool(on_files=got.append, sandbox=sandbox, files={"in": b"1"})
    with Toolbox([tool]) as toolbox:
        answer = toolbox.call("python", {"code": "open('plot.csv', 'w').write('x,y')\nprint('done')"}).content
        assert answer == "done\nFiles written: plot.csv (3 bytes).\n"
        assert toolbox.call("python", {"code": "print(open('in').read())"}).content == "1\n"
        failed = toolbox.call("python", {"code": "import os\nopen('a', 'w')\nos.mkdir('b')\n1 / 0"})
        assert "Files written: a (0 bytes). Not kept: b: a folder." in failed.content
        many = "for n in range(90): open('n' * 200 + str(n), 'w')\nprint('y' * 9000)"
        assert len(toolbox.call("python", {"code": many}).content) < 4700
    assert got[:2] == [{"plot.csv": b"x,y"}, {"a": b""}]


def test_the_stateful_tool_hands_over_what_each_call_changed(sandbox):
    got = []
    with Toolbox([python_tool(stateful=True, on_files=got.append, sandbox=sandbox)]) as toolbox:
        toolbox.call("python", {"code": "open('a', 'w').write('1')"})
        assert toolbox.call("python", {"code": "open('a').read()"}).content == "'1'\n"
        toolbox.call("python", {"code": "open('a', 'a').write('2'); open('b', 'w').write('3')"})
        toolbox.reset()
        assert toolbox.call("python", {"code": "import os; os.listdir()"}).content == "[]\n"
    assert got == [{"a": b"1"}, {"a": b"12", "b": b"3"}]
