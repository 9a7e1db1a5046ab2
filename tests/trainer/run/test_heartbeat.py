"""One of several processes fails, is killed, is stopped twice or falls silent: all end soon, and it is said once.

No launcher ends the others here, and collectives time out in six hours.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import opd_env.trainer
import opd_env.trainer.run.config
from opd_env.cli import main
from opd_env.trainer.learn.objective import OPDObjective
from opd_env.trainer.learn.update import Updater
from opd_env.trainer.run import processes
from opd_env.trainer.run.checkpoint import Checkpoints
from opd_env.trainer.run.held_out import HeldOut
from opd_env.trainer.run.learner import Learner, read_metrics
from opd_env.trainer.run.loop import OPDTrainer
from opd_env.trainer.run.rollouts import StepRollouts
from tests.trainer.together import ends, together
from tests.trainer.toy import loaded, toy_config

PLACES = {
    "building": (OPDTrainer, "_build"),
    "evaluation": (HeldOut, "_play"),
    "rollout": (StepRollouts, "play"),
    "learning": (Learner, "learn"),
    "teacher": (OPDObjective, "begin"),
    "update": (Updater, "update"),
    "all save": (OPDTrainer, "_save"),
    "one saves": (Checkpoints, "save"),
}


def work(rank, folder, who=None, place=None, action=None, machines=False, silence=None, steps=4):
    """``opd-env train`` with tiny models; in process ``who``, ``action`` comes before ``place`` (of step 2)."""
    if machines:
        os.environ |= {"GROUP_RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    if silence:
        processes.SILENCE_S, processes.GRACE_S = silence, 0.5
    if rank == who or who == "all":
        owner, name = PLACES[place]
        method = getattr(owner, name)

        def call(self, at, *rest, **keywords):
            if at == 2 or not isinstance(at, int):
                action()
            return method(self, at, *rest, **keywords)

        setattr(owner, name, call)
    opd_env.trainer.run.config.load_config = lambda _: toy_config(folder, steps=steps, checkpoint_keep=9)
    models = {"student": loaded(1, "student"), "teacher": loaded(2, "teacher", spread=0.3)}
    opd_env.trainer.OPDTrainer = lambda config: OPDTrainer(config, **models)
    return main(["train"])


class Raises:
    def __init__(self, error):
        self.error = error

    def __call__(self):
        raise self.error


def two_signals():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)


def die_before_a_child():
    """Killed, while a fork of it lives on with copies of all its connections."""
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)
    os._exit(0)


def model_bytes(run):
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What two processes end in when nothing disturbs them."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    with together(2, folder, work, folder / "run") as lives:
        assert ends(lives) == [0, 0]
    assert lives[1].text() == ""  # the first process alone shows how it goes
    return model_bytes(folder / "run")


def assert_continues(folder, undisturbed):
    with together(2, folder / "again", work, folder / "run") as lives:
        assert ends(lives) == [0, 0]
    assert "continuing after step" in lives[0].text() or not Checkpoints(folder / "run/checkpoints").steps()
    assert model_bytes(folder / "run") == undisturbed


@pytest.mark.parametrize(
    ("place", "who", "error"),
    [
        ("building", 1, RuntimeError("no room on this device")),
        ("evaluation", 0, KeyError("a bug")),
        ("rollout", 1, ValueError("the index of the search tool cannot be read")),
        ("teacher", 1, torch.OutOfMemoryError("out of memory")),
        ("update", 0, MemoryError("the teacher needs more")),
        ("one saves", 0, OSError(28, "No space left on device")),
        ("rollout", "all", ValueError("nothing fits")),
    ],
)
def test_an_error_of_one_process_ends_all_and_is_shown_once(tmp_path, place, who, error):
    with together(2, tmp_path, work, tmp_path / "run", who, place, Raises(error)) as lives:
        assert 0 not in ends(lives, within=20)
    texts = [life.text() for life in lives]
    assert sum(text.count(str(error)) for text in texts) == 1, texts
    if who != "all":
        assert str(error) in texts[who]
        assert "Error" not in texts[1 - who]


def test_the_error_of_another_machine_is_shown_there_and_here(tmp_path):
    error = ValueError("the index cannot be read")
    with together(2, tmp_path, work, tmp_path / "run", 1, "rollout", Raises(error), True) as lives:
        assert ends(lives, within=20) == [2, 2]
    here, there = (life.text().splitlines()[-1] for life in lives)
    assert there == "opd-env: the index cannot be read"
    assert here.startswith("opd-env: process 1 on ")
    assert here.endswith(f"failed: ValueError: {error}; so all processes end; start the same command again to continue")


@pytest.mark.parametrize(
    ("place", "who", "kept"), [("rollout", 0, 2), ("learning", 1, 2), ("all save", 1, 1), ("one saves", 0, 1)]
)
def test_a_second_signal_that_reaches_one_process_ends_both(undisturbed, tmp_path, place, who, kept):
    with together(2, tmp_path, work, tmp_path / "run", who, place, two_signals) as lives:
        codes = ends(lives, within=20)
    assert codes[who] == 130
    assert codes[1 - who] == 2
    assert f"stopped at once, by a second signal. The checkpoint of step {kept} is kept" in lives[who].text()
    assert "Traceback" not in lives[0].text() + lives[1].text()
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest().step == kept
    if place in ("learning", "one saves"):
        assert_continues(tmp_path, undisturbed)


@pytest.mark.parametrize("who", [0, 1])
def test_when_one_process_is_killed_the_other_says_so_and_ends_and_the_run_continues(undisturbed, tmp_path, who):
    run = tmp_path / "run"
    with together(2, tmp_path, work, run) as lives:
        deadline = time.monotonic() + 60
        while len(read_metrics(run / "metrics.jsonl")) < 2 and time.monotonic() < deadline:
            time.sleep(0.002)
        lives[who].signal(signal.SIGKILL)
        codes = ends(lives, within=20)
    assert codes[who] == -signal.SIGKILL
    assert codes[1 - who] == 2
    said = lives[1 - who].text().splitlines()[-1]
    assert said.startswith(f"opd-env: process {who} on ")
    assert "is gone: killed, or its machine is lost; so all processes end" in said
    assert_continues(tmp_path, undisturbed)


def test_a_killed_process_is_missed_at_once_although_a_child_of_it_lives(tmp_path):
    with together(2, tmp_path, work, tmp_path / "run", 1, "rollout", die_before_a_child, False, 100.0) as lives:
        assert ends(lives, within=20) == [2, -signal.SIGKILL]
    assert "is gone: killed, or its machine is lost; so all processes end" in lives[0].text()


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_is_silent_is_given_up(tmp_path, who):
    run = tmp_path / "run"
    with together(2, tmp_path, work, run, None, None, None, False, 3.0, 10_000) as lives:
        deadline = time.monotonic() + 60
        while not read_metrics(run / "metrics.jsonl") and time.monotonic() < deadline:
            time.sleep(0.01)
        lives[who].signal(signal.SIGSTOP)
        assert ends(lives[1 - who : 2 - who], within=20) == [2]
    said = lives[1 - who].text().splitlines()[-1]
    assert said.startswith(f"opd-env: process {who} on ")
    assert "gave no sign of life for 3 s" in said


def test_a_stranger_who_finds_the_port_is_no_process_of_the_run(monkeypatch):
    meet, mine, beats = threading.Barrier(2), {}, {}

    def gathered(own):
        rank = int(threading.current_thread().name)
        mine[rank] = own
        meet.wait(10)
        if rank == 1:
            with socket.create_connection(("127.0.0.1", mine[0][0][1])) as stranger:
                stranger.sendall(b"let me in 1\n")
        return mine[0] + mine[1]

    def live(rank):
        beat = processes.Heartbeat(
            SimpleNamespace(process_index=rank, num_processes=2, is_local_main_process=rank == 0)
        )
        with contextlib.suppress(processes.EndedByAnother, ValueError), beat:
            meet.wait(10)
            if rank == 1:
                raise ValueError("mine")
            beat._over.wait(10)
        beats[rank] = beat

    monkeypatch.setattr(processes, "gather_object", gathered)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(processes, "_thread", SimpleNamespace(interrupt_main=lambda: None))
    threads = [threading.Thread(target=live, args=(rank,), name=str(rank)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [beats[rank]._end.reason.partition(" failed: ")[2] for rank in (0, 1)] == ["ValueError: mine"] * 2


def test_one_process_alone_has_no_thread_and_keeps_its_errors():
    beat = processes.Heartbeat(SimpleNamespace(process_index=0, num_processes=1, is_local_main_process=True))
    with pytest.raises(KeyError, match="mine"), beat:
        raise KeyError("mine")
    with beat:
        assert not beat.ended
    beat.stop()
