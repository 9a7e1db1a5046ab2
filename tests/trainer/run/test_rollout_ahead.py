"""One step ahead: the same bits every time, nothing lost by a kill, and what is off-policy is measured and said."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from opd_env.engines.local import LocalEngine
from opd_env.episode.store import load_trajectories
from opd_env.errors import TrainingError, UserError
from opd_env.evaluation.read_run import read_metrics
from opd_env.settings.fields import ConfigError
from opd_env.trainer.run.config import LoRASettings
from opd_env.trainer.run.setup import Parts
from tests.trainer.run.test_crash_safety import ENVIRONMENT, ROOT
from tests.trainer.run.test_loop import Killed, assert_same, kill_in, trainer_of, weights
from tests.trainer.toy import toy_config


def ahead_config(folder, **changes):
    return toy_config(folder, **{"rollout_ahead": True, "evaluation_every": 2, "learning_rate": 1e-2, **changes})


def episodes_of(run):
    """Stored episodes by file: what was sampled, in any order."""
    return {
        path.stem: sorted((one.example_id, one.sample, one.token_ids.tobytes()) for one in load_trajectories(path))
        for path in sorted((Path(run) / "trajectories").iterdir())
    }


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("opd-env-rollout")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = ahead_config(tmp_path_factory.mktemp("runs") / "straight")
    trainer = trainer_of(config, teacher_spread=0.6)
    trainer.train()
    return config, weights(trainer)


def continued(config):
    trainer = trainer_of(config, teacher_spread=0.6)
    trainer.train()
    return weights(trainer)


def test_the_same_run_again_gives_the_same_bits_and_the_same_episodes(finished, tmp_path):
    again = ahead_config(tmp_path / "again")
    assert_same(finished[1], continued(again))
    assert episodes_of(again.run.output) == episodes_of(finished[0].run.output)
    assert not threads()


def test_every_step_but_the_first_is_sampled_by_the_student_of_one_step_before(finished, tmp_path):
    """Counted by hand: step t + 1 is what the engine samples with the weights from before update t."""
    trainer = trainer_of(ahead_config(tmp_path / "run"), teacher_spread=0.6)
    samplers, students = [], []
    play, learn = trainer.rollouts.play, trainer._learn

    def watched_play(step, *args):
        samplers.append({name: value.clone() for name, value in trainer.engine._model.named_parameters()})
        return play(step, *args)

    def watched_learn(step, played):
        students.append(weights(trainer))
        return learn(step, played)

    trainer.rollouts.play, trainer._learn = watched_play, watched_learn
    trainer.train()
    assert len(samplers) == len(students) == 4
    for sampler, student in zip(samplers, [students[0], *students[:3]], strict=True):
        assert_same(student, sampler)
    assert any(not torch.equal(value, students[1][name]) for name, value in students[0].items())


def test_the_thread_computes_on_the_device_of_its_process(tmp_path, monkeypatch):
    """A new thread would begin on device 0."""
    chosen = []
    monkeypatch.setattr("torch.accelerator.set_device_index", lambda index: chosen.append((index, threads())))
    trainer = trainer_of(ahead_config(tmp_path / "run"))
    monkeypatch.setattr(trainer.rollouts, "play", lambda *_: chosen.append(threading.current_thread().name))
    for device in ("cpu", "cuda:1"):
        monkeypatch.setattr(type(trainer.accelerator), "device", torch.device(device))
        with trainer.rollouts.ahead(1):
            pass
    assert chosen == ["opd-env-rollout_0", (1, ["opd-env-rollout_0"]), "opd-env-rollout_0"]


def test_staleness_and_ratios_are_in_the_metrics(finished):
    rows = [row for row in read_metrics(Path(finished[0].run.output) / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/staleness"] for row in rows] == [0, 1, 1, 1]
    assert ["train/logprob_gap" in row for row in rows] == [True, False, False, False]
    assert abs(rows[0]["train/ratio_log_mean"]) < 1e-6
    assert rows[0]["train/ratio_sample_size"] == pytest.approx(1, abs=1e-6)
    for row in rows[1:]:
        assert 0 < abs(row["train/ratio_log_mean"]) <= row["train/ratio_log_max"]
        assert 0 < row["train/ratio_sample_size"] < 1 - 1e-6
    for row in rows:
        assert row["time/rollout_s"] + row["time/teacher_s"] + row["time/update_s"] <= row["time/step_s"]
        assert row["time/rollout_ahead_s"] > 0


def test_several_updates_per_step_are_all_counted(tmp_path):
    config = ahead_config(tmp_path / "run", steps=2, updates_per_step=2, evaluation_every=0)
    trainer_of(config).train()
    first, second = (row["train/staleness"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert 0 < first < 1  # 0 for the first update's tokens, 1 for the second's
    assert 2 < second < 3


@pytest.mark.parametrize(("method", "step"), [("play", 1), ("play", 2), ("_learn", 2), ("_learn", 3), ("_save", 3)])
def test_a_killed_run_continues_to_the_same_bits_and_plays_nothing_twice(finished, tmp_path, method, step):
    config = ahead_config(tmp_path / "run")
    trainer = trainer_of(config, teacher_spread=0.6)
    kill_in(trainer, method, step)
    with pytest.raises(Killed):
        trainer.train()
    assert not threads()
    again = trainer_of(config, teacher_spread=0.6)
    played = []
    play = again.rollouts.play
    again.rollouts.play = lambda step, *args: (played.append(step), play(step, *args))[1]
    done = again.checkpoints.steps()
    again.train()
    assert played == list(range(done[-1] + 1 if done else 0, 4))  # what the checkpoint held was not sampled again
    assert_same(finished[1], weights(again))
    assert episodes_of(config.run.output) == episodes_of(finished[0].run.output)


@pytest.mark.parametrize("moment", ["rollout", "update"])
def test_ctrl_c_keeps_the_episodes_that_were_sampled_ahead(finished, tmp_path, moment):
    config = ahead_config(tmp_path / "run", checkpoint_every=0)
    trainer = trainer_of(config, teacher_spread=0.6)
    part, name = (trainer.rollouts, "take") if moment == "rollout" else (trainer, "_learn")
    original = getattr(part, name)

    def interrupted(step, *args):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return original(step, *args)

    setattr(part, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.checkpoints.steps() == [2 if moment == "rollout" else 3]
    assert not threads()
    assert_same(finished[1], continued(config))


def test_a_second_ctrl_c_ends_the_rollout_at_once_and_saves_nothing_half_done(finished, tmp_path):
    config = ahead_config(tmp_path / "run", checkpoint_every=1)
    trainer = trainer_of(config, teacher_spread=0.6)
    learn = trainer._learn

    def interrupted(step, played):
        metrics = learn(step, played)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return metrics

    trainer._learn = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.checkpoints.steps() == [1, 2]
    assert not threads()
    assert_same(finished[1], continued(config))


def test_a_failure_in_the_block_ends_the_rollout_in_the_middle(tmp_path):
    """The engine would go on for minutes; the thread is gone when the error arrives."""
    trainer = trainer_of(ahead_config(tmp_path / "run"))
    step, asked = trainer.engine.step, threading.Event()

    def slow_step():
        if threading.current_thread() is not threading.main_thread():
            asked.set()
            time.sleep(0.05)
        return step() if not asked.is_set() else []

    trainer.engine.step = slow_step
    trainer._learn = lambda step, played: asked.wait(10) and (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        trainer.train()
    assert not threads()
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.name.endswith("unfinished")]


@pytest.mark.parametrize(("error", "kind"), [(UserError("no server"), TrainingError), (KeyError("bug"), KeyError)])
def test_what_ends_the_rollout_is_raised_by_the_step_with_its_number(tmp_path, error, kind):
    trainer = trainer_of(ahead_config(tmp_path / "run"))
    play = trainer.rollouts.play

    def failing(step, *args):
        if step == 2:
            raise error
        return play(step, *args)

    trainer.rollouts.play = failing
    with pytest.raises(kind) as caught:
        trainer.train()
    shown = str(caught.value) + " ".join(getattr(caught.value, "__notes__", []))
    assert "rollout of step 3" in shown
    assert trainer.checkpoints.steps() == [1]
    assert not threads()


def test_a_checkpoint_whose_episodes_are_damaged_is_passed_over(finished, tmp_path, caplog):
    config = ahead_config(tmp_path / "run")
    trainer = trainer_of(config, teacher_spread=0.6)
    kill_in(trainer, "_learn", 3)
    with pytest.raises(Killed):
        trainer.train()
    stored = tmp_path / "run" / "checkpoints" / "step_00000003" / "rollout.parquet"
    stored.write_bytes(stored.read_bytes()[:-9])
    assert_same(finished[1], continued(config))
    assert "rollout.parquet has" in caplog.text


def test_adapters_are_copied_and_the_weights_below_them_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(Parts, "save_student", lambda parts, folder: None)
    runs = [trainer_of(ahead_config(tmp_path / name, steps=2, lora=LoRASettings(rank=2))) for name in ("one", "two")]
    own = dict(runs[0].engine._model.named_parameters())
    for name, value in runs[0].parts.student.model.named_parameters():
        assert (own[name] is value) is not value.requires_grad
    for trainer in runs:
        trainer.train()
    assert_same(weights(runs[0]), weights(runs[1]))


def test_an_engine_with_weights_of_its_own_changes_when_told_and_only_between_rollouts():
    from opd_env.engines.base import Request, SamplingParams
    from tests.tiny import tiny_llama

    model, other = tiny_llama(seed=1), tiny_llama(seed=2)
    engine = LocalEngine(model, [2], 50, own_weights=True)
    params = SamplingParams(max_tokens=6, temperature=0.0)
    before = engine.generate([[5, 6, 7]], params)
    with torch.no_grad():
        for weight, new in zip(model.parameters(), other.parameters(), strict=True):
            weight.copy_(new)
    assert engine.generate([[5, 6, 7]], params) == before
    engine.submit(Request(0, [5, 6, 7], params))
    with pytest.raises(RuntimeError, match="while episodes are open"):
        engine.update_weights(model)
    engine.release(0)
    engine.update_weights(model)
    assert engine.generate([[5, 6, 7]], params) == LocalEngine(other, [2], 50).generate([[5, 6, 7]], params) != before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"estimator": "sampled"}, "set objective.ratio_policy=current"),
        ({"estimator": "sampled", "ratio_policy": "current", "gamma": 0.5}, "gamma=0.5 counts the divergence of later"),
        (
            {"estimator": "sampled", "ratio_policy": "current", "cross_tokenizer": True},
            "or teacher.cross_tokenizer out",
        ),
    ],
)
def test_what_a_ratio_per_token_does_not_correct_is_refused(tmp_path, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        ahead_config(tmp_path, **changes)


def test_the_sampled_estimator_learns_one_step_ahead(tmp_path):
    settings = {
        "estimator": "sampled", "baseline": "value", "ratio_policy": "current", "episodes_per_step": 32, "steps": 36,
        "learning_rate": 1e-2, "checkpoint_every": 0, "evaluation_every": 0,
    }  # fmt: skip
    trainer_of(ahead_config(tmp_path / "run", **settings), teacher_spread=0.6).train()
    kl = [row["teacher/kl"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert sum(kl[-4:]) < 0.95 * sum(kl[:4])


@pytest.mark.slow
def test_a_run_killed_at_random_moments_continues_to_the_same_bits():
    command = [sys.executable, "benchmarks/kill_resume.py", "--ahead", "--moments", "3", "--changes", "2"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[5-9] kills", done.stdout, re.MULTILINE)
    assert "0 differences" in done.stdout
