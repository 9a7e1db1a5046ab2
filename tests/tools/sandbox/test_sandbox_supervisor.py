"""The trainer's side: shared between threads and tasks, repairs what dies, and leaves nothing behind."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sandbox_harness import Processes, descriptors, eventually, settled

from opd_env.tools.sandbox import Limits, SandboxUnavailable, SessionEnded, Status, open_sandbox
from opd_env.tools.sandbox.kernel import KernelSandbox
from opd_env.tools.sandbox.pool import Turnstile

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def sandbox(request):
    try:
        with open_sandbox(request.param, slots=2) as sandbox:
            yield sandbox
    except SandboxUnavailable as error:
        pytest.skip(error.reason)


@pytest.fixture
def alone(sandbox):
    """One that no other test uses: nothing of an earlier test runs, or is still dying, in what is counted."""
    with KernelSandbox(sandbox.level, slots=1) as alone:
        alone.run("1")
        yield alone


def test_threads_share_it_and_every_answer_goes_to_its_question(sandbox):
    with ThreadPoolExecutor(8) as threads:
        outputs = list(threads.map(lambda n: sandbox.run(f"print({n})").output, range(40)))
    assert outputs == [f"{n}\n" for n in range(40)]


def test_tasks_share_it_and_do_not_hold_the_event_loop(sandbox):
    async def both():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticker = asyncio.create_task(tick())
        results = await asyncio.gather(*(sandbox.arun(f"import time; time.sleep(0.1); print({n})") for n in range(8)))
        ticker.cancel()
        return ticks, [result.output for result in results]

    ticks, outputs = asyncio.run(both())
    assert outputs == [f"{n}\n" for n in range(8)]
    assert ticks >= 3  # of about 40; if the loop is held, there is one


def test_waiting_for_a_slot_does_not_count_as_running(sandbox):
    with ThreadPoolExecutor(3) as threads:
        both_slots = [threads.submit(sandbox.run, "import time; time.sleep(1.5)") for _ in range(2)]
        time.sleep(0.2)
        waits = threads.submit(sandbox.run, "print(1)", limits=Limits(wall_s=1.0))
        assert [call.result().status for call in [*both_slots, waits]] == [Status.OK] * 3


def test_a_dead_slot_is_replaced(sandbox):
    sandbox.run("print(1)")
    pool = sandbox._pool
    for slots in pool._idle.values():
        for slot in slots:
            signal.pidfd_send_signal(slot._handle, signal.SIGKILL)
    with sandbox.session() as session:
        assert session.run("1").output == "1\n"
    assert sandbox.run("print(2)").output == "2\n"


def test_a_dead_zygote_is_replaced(sandbox):
    sandbox.run("print(1)")
    processes = Processes(sandbox)
    assert processes()
    for zygote in sandbox._pool._zygotes.values():
        zygote._process.kill()
        zygote._process.wait()
    assert eventually(lambda: not processes()), "its slots die a moment later: one that still answers may be used"
    assert sandbox.run("print(2)").output == "2\n"
    with sandbox.session() as session:
        assert session.run("3").output == "3\n"


def test_a_slot_that_hangs_is_killed_and_the_call_is_tried_again(sandbox, monkeypatch):
    monkeypatch.setattr("opd_env.tools.sandbox.slots.GRACE_S", 1.0)
    sandbox.run("print(1)")
    for slots in sandbox._pool._idle.values():
        for slot in slots:
            signal.pidfd_send_signal(slot._handle, signal.SIGSTOP)
    assert sandbox.run("print(2)", limits=Limits(wall_s=1.0)).status is Status.OK


def test_a_worn_slot_is_replaced(alone, monkeypatch):
    monkeypatch.setattr("opd_env.tools.sandbox.pool._CALLS_PER_SLOT", 1)
    processes = Processes(alone)
    before = settled(lambda: len(processes()))
    for n in range(5):
        assert alone.run(f"print({n})").output == f"{n}\n"
    assert eventually(lambda: len(processes()) <= before), processes()


def test_nothing_grows_over_many_calls(alone):
    """A short soak; the long one is ``python benchmarks/sandbox.py --soak 10000``."""
    codes = ["print(1)", "1/0", "import os; os._exit(3)", "open('x', 'w').write('y' * 1000)", "print('z' * 5000)"]

    def use(calls):
        for n in range(calls):
            assert alone.run(codes[n % len(codes)]).status in (Status.OK, Status.ERROR)
        for _ in range(10):
            with alone.session() as session:
                session.run("x = [1] * 1000")

    use(20)
    processes, open_before, threads = Processes(alone), descriptors(), set(threading.enumerate())
    count = settled(lambda: len(processes()))
    tracemalloc.start()
    try:
        use(5)  # what is kept for good
        bytes_before = tracemalloc.get_traced_memory()[0]
        use(125)
        grown = tracemalloc.get_traced_memory()[0] - bytes_before
    finally:
        tracemalloc.stop()
    assert grown < 500_000  # 4 kB a call
    assert eventually(lambda: len(descriptors()) <= len(open_before)), descriptors() - open_before
    assert eventually(lambda: set(threading.enumerate()) <= threads), threading.enumerate()
    assert eventually(lambda: len(processes()) <= count), processes()


def test_a_closed_sandbox_refuses_and_has_left_nothing(sandbox):
    before = descriptors()
    other = open_sandbox(sandbox.level, slots=1)
    session = other.session()
    session.run("1")
    other.run("import numpy")
    processes = Processes(other)
    assert len(processes()) >= 4  # two zygotes and two slots, and what these have forked
    other.close()
    other.close()
    assert eventually(lambda: not processes()), processes()
    assert eventually(lambda: descriptors() <= before), descriptors() - before
    with pytest.raises(RuntimeError, match="closed"):
        other.run("1")
    with pytest.raises((RuntimeError, SessionEnded)):
        session.run("1")


@pytest.mark.parametrize("room", [0, 1, 2, 3, 4, 6])
def test_a_trainer_without_descriptors_is_told_so_and_loses_nothing(alone, room):
    before = len(descriptors())
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as held:
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, old)
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 100, old[1]))
        with contextlib.suppress(OSError):
            while True:
                held.callback(os.close, last := os.open("/dev/null", os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1 + room, old[1]))
        result = alone.run("print(1)")
        with alone.session() as session:
            cell = session.run("print(1)")
    for answer in (result, cell):
        said = "1\n" if answer.ok else "ulimit -n"
        assert answer.ok or answer.status is Status.SANDBOX_ERROR
        assert said in answer.output
    assert room or not result.ok
    assert eventually(lambda: len(descriptors()) <= before), descriptors()
    assert alone.run("print(2)").output == "2\n"


def test_closing_ends_what_runs(sandbox):
    other = KernelSandbox(sandbox.level, slots=2, limits=Limits(wall_s=200, cpu_s=200))
    session = other.session()
    session.run("1")
    with ThreadPoolExecutor(4) as threads:
        cell = threads.submit(session.run, "while True: pass")
        assert eventually(lambda: other._turnstile._free == 1)
        calls = [threads.submit(other.run, "while True: pass") for _ in range(3)]
        assert eventually(lambda: len(other._turnstile._waiting) == 2)
        time.sleep(0.2)  # so that they run, and do not only begin to
        other.close()
        assert cell.result(60).status is Status.SANDBOX_ERROR
        for call in calls:
            with pytest.raises(RuntimeError, match="closed"):
                call.result(60)


def test_a_blocked_event_loop_does_not_lengthen_a_call(sandbox, monkeypatch):
    ended, run = threading.Event(), sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda *arguments, **options: (run(*arguments, **options), ended.set())[0])

    async def blocked():
        call = asyncio.create_task(sandbox.arun("while True: pass", limits=Limits(wall_s=0.2)))
        await asyncio.sleep(0.05)
        assert ended.wait(30), "the call needs the event loop to end"
        return await call

    assert asyncio.run(blocked()).status is Status.TIMEOUT


def test_a_call_that_nobody_waits_for_any_more_gives_its_place_back(sandbox):
    async def cancelled():
        calls = [asyncio.create_task(sandbox.arun("import time; time.sleep(0.3)")) for _ in range(6)]
        await asyncio.sleep(0.1)
        for call in calls:
            call.cancel()
        return await asyncio.gather(*calls, return_exceptions=True)

    for answer in asyncio.run(cancelled()):  # on a busy machine some have ended before
        assert isinstance(answer, asyncio.CancelledError) or answer.ok
    with ThreadPoolExecutor(2) as threads:
        assert [result.output for result in threads.map(sandbox.run, ["print(1)"] * 4)] == ["1\n"] * 4


def test_hundreds_of_calls_at_once(sandbox):
    async def all_of_them():
        return await asyncio.gather(*(sandbox.arun(f"print({n})") for n in range(300)))

    assert [result.output for result in asyncio.run(all_of_them())] == [f"{n}\n" for n in range(300)]


def test_slots_of_many_sessions_are_not_kept_for_ever(sandbox, monkeypatch):
    monkeypatch.setattr("opd_env.tools.sandbox.pool._MAX_IDLE", 2)
    sessions = [sandbox.session() for _ in range(6)]
    for session in sessions:
        session.run("1")
    for session in sessions:
        session.close()
    assert len(sandbox._pool._idle["stdlib"]) <= 2


def test_untrusted_code_is_what_the_kernel_ends_when_memory_runs_out(sandbox):
    sandbox.run("1")
    zygotes = sandbox._pool._zygotes.values()
    assert {Path(f"/proc/{zygote._process.pid}/oom_score_adj").read_text() for zygote in zygotes} == {"1000\n"}
    assert int(Path("/proc/self/oom_score_adj").read_text()) < 1000


def test_a_fork_of_the_trainer_is_told_to_open_its_own(sandbox):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sandbox.run("print(1)")
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    assert b"before a fork" in os.read(reading, 1000)
    os.close(reading)
    assert sandbox.run("print(1)").output == "1\n"


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_nothing_is_left_when_the_trainer_is_killed(level, tmp_path):
    """Neither processes nor files, even while calls run, a session is frozen, and a fork of the trainer lives on."""
    program = tmp_path / "trainer.py"
    program.write_text(f"""
import os, sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from sandbox_harness import Processes
from opd_env.tools.sandbox import open_sandbox, SandboxUnavailable
try:
    sandbox = open_sandbox({level!r}, slots=2)
except SandboxUnavailable:
    print("[]", flush=True)
    sys.exit()
session = sandbox.session()
session.run("import threading\\ndef f():\\n  while True: pass\\nthreading.Thread(target=f).start()")
threading.Thread(target=sandbox.run, args=("while True: pass",)).start()
time.sleep(0.3)
pids = list(Processes(sandbox)())
worker = os.fork()
if worker == 0:
    time.sleep(200)   # a worker that holds copies of all descriptors
    os._exit(0)
import json
print(json.dumps([worker, *pids]), flush=True)
time.sleep(200)
""")
    files = tmp_path / "files"
    files.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(files)}
    trainer = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True, env=environment)
    worker, *pids = json.loads(trainer.stdout.readline()) or [0]
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    if not pids:
        pytest.skip(f"{level} does not work here")
    assert len(pids) >= 4

    def alive(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
        except OSError:
            return False

    try:
        assert eventually(lambda: not any(alive(pid) for pid in pids)), [pid for pid in pids if alive(pid)]
        assert alive(worker)
    finally:
        os.kill(worker, signal.SIGKILL)
    assert not os.listdir(files)


def test_the_turnstile_is_fair_and_its_queue_is_bounded():
    turnstile = Turnstile(places=1, queue=3)
    order = []

    def enter(name):
        with turnstile:
            order.append(name)

    threads = []
    with turnstile:
        for name in "abc":
            threads.append(threading.Thread(target=enter, args=(name,)))
            threads[-1].start()
            assert eventually(lambda: len(turnstile._waiting) == len(threads))
        with pytest.raises(RuntimeError, match="3 calls wait"):
            enter("d")
    for thread in threads:
        thread.join()
    assert order == ["a", "b", "c"]
    enter("e")
    assert order[-1] == "e"
