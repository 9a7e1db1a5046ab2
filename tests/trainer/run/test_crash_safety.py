"""Kills, full and read-only disks, damaged files, Ctrl-C: through the command line, and to the same bits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd_env.cli import main
from opd_env.episode.files import StoreError
from opd_env.evaluation.read_run import read_metrics
from opd_env.trainer.run.checkpoint import Checkpoints
from opd_env.trainer.run.folder import RunFolder
from tests.trainer.run.test_loop import trainer_of
from tests.trainer.toy import toy_config

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
WORDS = [
    "train", "--student.model", "packaged:student", "--teacher.model", "packaged:teacher", "--task", "arithmetic",
    "--run.steps", "3", "--sampling.episodes_per_step", "4", "--evaluation.problems", "1",
    "--run.checkpoint_every", "1",
    "--sampling.limits.max_turns", "2", "--sampling.limits.max_turn_tokens", "12",
    "--sampling.limits.max_tokens", "320",
]  # fmt: skip
"""A run of about two seconds; its checkpoints have 3.9 MB each."""


def model_bytes(run):
    return (run / "model" / "model.safetensors").read_bytes()


def half_written(run):
    return [path for path in run.rglob(".*") if path.name != ".gitignore"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the run of ``WORDS`` must end in."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert main([*WORDS, "--run.output", str(run)]) == 0
    return run


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bits_and_metrics():
    """A few moments of what ``benchmarks/kill_resume.py`` does two hundred times."""
    command = [sys.executable, "benchmarks/kill_resume.py", "--moments", "2", "--changes", "3"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[5-9] kills", done.stdout, re.MULTILINE)
    assert "0 differences" in done.stdout


_DISK = """
import contextlib, io, json, subprocess, sys
from opd_env.cli import main

folder, *words = sys.argv[1:]
for options in ("size=6m", "remount,size=64m", "remount,ro"):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    subprocess.run(["cp", "-r", folder, f"{folder}-{options.rpartition('=')[2]}"], check=True)
    print(json.dumps([code, shown.getvalue().splitlines()[-1]]))
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full_or_read_only_is_one_sentence(undisturbed, tmp_path):
    namespace = ["unshare", "--map-root-user", "--mount"]
    disk = tmp_path / "disk"
    disk.mkdir()
    trial = [*namespace, "mount", "-t", "tmpfs", "none", str(disk)]
    if shutil.which("unshare") is None or subprocess.run(trial, capture_output=True).returncode:
        pytest.skip("this machine allows no small file system of its own")
    command = [*namespace, sys.executable, "-c", _DISK, str(disk), *WORDS, "--run.output", str(disk / "run")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (full, sentence), (again, _), (read_only, refusal) = map(json.loads, done.stdout.splitlines())
    assert (full, again, read_only) == (2, 0, 2)
    assert sentence.startswith("opd-env: the checkpoint of step 2 cannot be written")
    assert "No space left on device" in sentence
    assert sentence.endswith("the one of step 1 is kept; free space, then start the same command again to continue")
    assert refusal.startswith("opd-env: ")
    assert "Read-only file system" in refusal
    full_run, finished_run = tmp_path / "disk-6m" / "run", tmp_path / "disk-64m" / "run"
    assert not half_written(full_run)
    assert Checkpoints(full_run / "checkpoints").newest().step == 1
    assert model_bytes(finished_run) == model_bytes(undisturbed)
    assert [row["step"] for row in read_metrics(finished_run / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.slow
def test_ctrl_c_is_said_clearly_and_the_same_command_continues(undisturbed, tmp_path):
    run = tmp_path / "run"
    words = [*WORDS, "--run.output", str(run)]
    command = [sys.executable, "-m", "opd_env.cli", *words]
    started = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not read_metrics(run / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.002)
    started.send_signal(signal.SIGINT)
    out, shown = started.communicate(timeout=100)
    assert started.returncode == 130, out + shown
    assert "start the same command again to continue" in shown
    assert "Traceback" not in shown
    assert not half_written(run)
    assert 1 <= Checkpoints(run / "checkpoints").newest().step <= 3
    assert main(words) == 0
    assert model_bytes(run) == model_bytes(undisturbed)


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_in_the_same_bits(undisturbed, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    weights = run / "checkpoints" / "step_00000003" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main([*WORDS, "--run.output", str(run)]) == 0
    assert "the one before it is used" in caplog.text
    assert model_bytes(run) == model_bytes(undisturbed)
    assert Checkpoints(run / "checkpoints").steps() == [2, 3]


def test_a_damaged_later_checkpoint_never_displaces_a_sound_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    write = {"a.txt": lambda path: path.write_text("a")}
    for step in (3, 10):
        Checkpoints(tmp_path, keep=2).save(step, write)
    (tmp_path / "step_00000010" / "a.txt").write_text("b")
    assert checkpoints.newest().step == 3
    checkpoints.save(4, write)  # the run goes on from step 3
    assert checkpoints.steps() == [4]


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(tmp_path):
    """Killed between the checkpoint of a step and its evaluation: the line is in metrics.jsonl all the same, once."""
    config = toy_config(tmp_path / "run", evaluation_every=2)
    trainer = trainer_of(config)

    class Killed(Exception):
        pass

    def kill(*_):
        raise Killed

    trainer.held_out.during = kill
    with pytest.raises(Killed):
        trainer.train()
    assert trainer.checkpoints.steps() == [1, 2]
    trainer_of(config).train()
    trainer_of(config).train()  # a finished run adds nothing
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], "eval/accuracy" in row) for row in rows] == [
        (1, False), (2, False), (2, True), (3, False), (4, False),
    ]  # fmt: skip


def test_a_folder_that_a_kill_left_empty_is_a_new_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.77.unfinished").touch()
    RunFolder(toy_config(tmp_path / "run")).open()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_episodes_of_steps_that_are_taken_again_are_forgotten(tmp_path):
    """A run on two processes was killed in step 3 and goes on alone: the second process's episodes must not stay."""
    folder = RunFolder(toy_config(tmp_path / "run"))
    folder.open()
    stored = tmp_path / "run" / "trajectories"
    stored.mkdir()
    names = ["step_00000002.parquet", "step_00000002_process_1.parquet"]
    for name in [*names, "step_00000003.jsonl", "step_00000003_process_1.parquet"]:
        (stored / name).touch()
    folder.forget_episodes(2)
    assert sorted(path.name for path in stored.iterdir()) == names


def test_what_a_kill_left_half_written_goes_when_the_run_continues(tmp_path):
    folder = RunFolder(toy_config(tmp_path / "run"))
    folder.open()
    for name in (".model.unfinished/weights", "trajectories/.step_00000001.parquet.77.unfinished"):
        (tmp_path / "run" / name).parent.mkdir()
        (tmp_path / "run" / name).touch()
    assert half_written(tmp_path / "run")
    folder.open()
    assert not half_written(tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_run_that_is_half_removed_can_still_be_replaced(tmp_path, monkeypatch):
    RunFolder(toy_config(tmp_path / "run")).open()
    for name in ("a", "z"):
        (tmp_path / "run" / name).mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    anew = toy_config(tmp_path / "run", seed=1, resume="never")
    with pytest.raises(StoreError, match="Input/output error"):
        RunFolder(anew).open()
    monkeypatch.undo()
    RunFolder(anew).open()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_model_that_does_not_fit_on_the_disk_leaves_the_former_one(tmp_path):
    from safetensors import SafetensorError

    folder = RunFolder(toy_config(tmp_path / "run"))
    folder.open()
    folder.save_model(lambda path: (path / "weights").write_text("former"))

    def fail(path):
        (path / "weights").write_text("half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(StoreError, match="No space left on device"):
        folder.save_model(fail)
    assert (tmp_path / "run" / "model" / "weights").read_text() == "former"
    assert not half_written(tmp_path / "run")
