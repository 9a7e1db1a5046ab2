"""Two machines: network namespaces with a cable, a name, a working directory and caches of their own each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from opd_env.cli import main
from opd_env.trainer.run.checkpoint import Checkpoints
from opd_env.trainer.run.learner import read_metrics
from tests.trainer.run.test_crash_safety import model_bytes
from tests.trainer.together import CONFIGS, ROOT, ends, together

WORDS = [
    "train", "--student.model", "packaged:student", "--teacher.model", "packaged:teacher", "--task", "arithmetic",
    "--sampling.episodes_per_step", "4", "--evaluation.problems", "1",
    "--run.checkpoint_every", "1", "--run.checkpoint_keep", "9",
    "--sampling.limits.max_turns", "2", "--sampling.limits.max_turn_tokens", "12",
    "--sampling.limits.max_tokens", "320",
]  # fmt: skip

STEPS = 8


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def network():
    """The names of two machines that reach each other, and nothing else."""
    names = [f"opd{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for number, name in enumerate(names, start=1):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", name, "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine allows no network of its own: {getattr(error, 'stderr', error)}")
    finally:
        for name in names if shutil.which("ip") else []:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextmanager
def machines(network, folder, outputs, steps):
    """``accelerate launch`` on both, with the shipped settings; yields what it writes on each, by a function."""
    started, logs = [], []
    for rank, (name, output) in enumerate(zip(network, outputs, strict=True)):
        home = folder / name
        home.mkdir(parents=True, exist_ok=True)
        logs.append(home / "log")
        launch = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu.yaml"),
            "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip",
            "10.77.0.1", "--main_process_port", "29611", "-m", "opd_env.cli", *WORDS, "--run.steps", str(steps),
            "--run.output", str(output),
        ]  # fmt: skip
        named = ["unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh", *launch]
        environment = {
            "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": name, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with logs[-1].open("w") as log:
            started.append(subprocess.Popen(
                ["ip", "netns", "exec", name, *named],
                cwd=home, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT,
            ))  # fmt: skip
    try:
        yield started, lambda: [log.read_text() for log in logs]
    finally:
        for name in network:
            end_all(name)
        for one in started:
            one.wait()


def end_all(name):
    """Kills every process of a machine at once."""
    for pid in ip("netns", "pids", name).split():
        os.kill(int(pid), signal.SIGKILL)


def trained(rank, words):
    return main(words)


@pytest.mark.slow
def test_a_lost_machine_ends_the_other_and_the_run_continues_to_the_same_bits(network, tmp_path):
    run, straight = tmp_path / "run", tmp_path / "straight"
    with machines(network, tmp_path, [run, run], steps=STEPS) as (started, texts):
        deadline = time.monotonic() + 150
        while len(read_metrics(run / "metrics.jsonl")) < 2:
            assert time.monotonic() < deadline, texts()
            time.sleep(0.01)
        end_all(network[1])
        assert started[0].wait(timeout=60) != 0
        assert f"opd-env: process 1 on {network[1]} is gone: killed, or its machine is lost" in texts()[0]
        done = Checkpoints(run / "checkpoints").newest().step
    assert 1 <= done < STEPS
    with machines(network, tmp_path, [run, run], steps=STEPS) as (started, texts):
        assert [one.wait(timeout=200) for one in started] == [0, 0], texts()
        assert f"continuing after step {done}" in texts()[0]
    words = [*WORDS, "--run.steps", str(STEPS), "--run.output", str(straight)]
    with together(2, tmp_path / "one machine", trained, words) as lives:
        assert ends(lives, within=200) == [0, 0]
    assert model_bytes(run) == model_bytes(straight)
    assert json.loads((run / "results.json").read_text())["steps"] == STEPS


@pytest.mark.slow
def test_machines_without_a_shared_folder_are_refused_on_both(network, tmp_path):
    with machines(network, tmp_path, [tmp_path / "here", tmp_path / "there"], steps=2) as (started, texts):
        assert 0 not in [one.wait(timeout=200) for one in started]
        here, there = texts()
    reason = f"of process 1 on {network[1]} is not that of process 0 on {network[0]}"
    assert reason in here
    assert reason in there
    assert "set output to a folder on a disk that all machines share" in there
