"""Whole runs of tiny models: they learn, can be stopped at any moment, and refuse what cannot be right."""

import json
import os
import signal
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from opd_env.engines.models import load_model
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.store import load_trajectories
from opd_env.errors import TrainingError
from opd_env.evaluation.read_run import read_metrics
from opd_env.settings.fields import ConfigError
from opd_env.trainer import OPDTrainer
from opd_env.trainer.run.checkpoint import CheckpointError
from opd_env.trainer.run.config import LoRASettings, load_config
from opd_env.trainer.run.setup import Parts
from tests.tiny import tiny_tokenizer
from tests.trainer.toy import loaded, toy_config


def trainer_of(config, student_spread=0.02, teacher_spread=0.3):
    return OPDTrainer(
        config,
        student=loaded(1, "student", spread=student_spread),
        teacher=loaded(2, "teacher", spread=teacher_spread),
        console=Console(file=StringIO(), width=200),
    )


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.updater.parameters.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of four steps, and its final weights."""
    config = toy_config(tmp_path_factory.mktemp("runs") / "straight", evaluation_every=2)
    trainer = trainer_of(config)
    results = trainer.train()
    return config, results, weights(trainer)


def test_a_run_leaves_everything_that_is_promised(finished):
    config, results, _ = finished
    folder = Path(config.run.output)
    stored = json.loads((folder / "results.json").read_text())
    assert stored == results
    for name in ("before", "after", "teacher"):
        assert {"accuracy", "accuracy_ci", "tool_call_validity", "n"} <= stored[name].keys()
        assert stored[name]["n"] == 2
    assert {"seconds", "seed", "config_hash", "versions"} <= stored.keys()
    assert stored["config_hash"] == config.config_hash
    assert load_config([str(folder / "config.yaml")]) == config
    assert len(load_trajectories(folder / "trajectories")) == 16
    assert (folder / "report.html").stat().st_size > 10_000
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000003", "step_00000004"]
    for name in ("before", "after"):
        ratios = json.loads((folder / "evaluations" / name / "log_ratios.json").read_text())
        episodes = load_trajectories(folder / "evaluations" / name / "trajectories.parquet")
        assert {f"{one.example_id}/{one.sample}": one.num_sampled for one in episodes} == {
            key: len(values) for key, values in ratios.items()
        }


def test_every_step_logs_every_promised_metric(finished):
    rows = read_metrics(Path(finished[0].run.output) / "metrics.jsonl")
    steps = [row for row in rows if "teacher/kl" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [2]
    promised = {
        "teacher/kl", "teacher/kl_turn_1", "teacher/kl_text", "rollout/accuracy", "rollout/response_length",
        "rollout/truncated_fraction", "rollout/turns", "rollout/end_of_turn_rate", "train/loss", "train/grad_norm",
        "train/entropy", "train/clip_fraction", "train/max_abs_advantage", "train/logprob_gap", "train/ratio_p99",
        "train/learning_rate", "time/rollout_s", "time/tools_s", "time/teacher_s", "time/update_s", "time/step_s",
        "tokens_per_s", "rollout/drift", "rollout/rows_per_trajectory", "rollout/failed_episodes",
    }  # fmt: skip
    for row in steps:
        assert promised <= row.keys()
        assert row["train/logprob_gap"] < 1e-5
        assert (row["rollout/drift"], row["rollout/rows_per_trajectory"]) == (0, 1)


def test_the_saved_model_is_the_trained_student(finished):
    config, _, trained = finished
    model = load_model(str(Path(config.run.output) / "model")).model
    assert_same(trained, dict(model.named_parameters()))


def test_the_same_run_again_gives_the_same_bits(finished, tmp_path):
    trainer = trainer_of(toy_config(tmp_path / "again"))
    trainer.train()
    assert_same(finished[2], weights(trainer))


class Killed(Exception):
    """Stands for a kill: nothing may be written after it."""


def kill_in(trainer, method, step):
    trainer = trainer.rollouts if method == "play" else trainer
    original = getattr(trainer, method)

    def call(at, *args, **keywords):
        if at == step:
            raise Killed
        return original(at, *args, **keywords)

    setattr(trainer, method, call)


@pytest.mark.parametrize(("method", "step"), [("play", 0), ("play", 2), ("_learn", 3), ("_save", 3)])
def test_a_killed_run_continues_to_the_same_bits(finished, tmp_path, method, step):
    config = toy_config(tmp_path / "run", evaluation_every=2)
    trainer = trainer_of(config)
    kill_in(trainer, method, step)
    with pytest.raises(Killed):
        trainer.train()
    again = trainer_of(config)
    again.train()
    assert_same(finished[2], weights(again))
    straight, continued = (
        [row for row in read_metrics(Path(c.run.output) / "metrics.jsonl") if "train/loss" in row]
        for c in (finished[0], config)
    )
    assert [row["train/loss"] for row in continued] == [row["train/loss"] for row in straight]
    assert len(load_trajectories(tmp_path / "run" / "trajectories")) == 16


@pytest.mark.parametrize("moment", ["rollout", "update"])
def test_ctrl_c_writes_a_checkpoint_and_the_same_command_continues(finished, tmp_path, moment):
    config = toy_config(tmp_path / "run", checkpoint_every=0, evaluation_every=2)
    trainer = trainer_of(config)
    part, name = (trainer.rollouts, "play") if moment == "rollout" else (trainer, "_learn")
    original = getattr(part, name)

    def interrupted(step, *args):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # a postponed signal lets this go on
        return original(step, *args)

    setattr(part, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    done = 2 if moment == "rollout" else 3
    assert trainer.checkpoints.steps() == [done]
    told = trainer.display.console.file.getvalue()
    assert f"stopped after step {done}; start the same command again" in told
    assert "warning: the teacher, with 0.0 % of the held-out problems, is no better than the student before" in told
    again = trainer_of(config)
    again.train()
    assert f"continuing after step {done}" in again.display.console.file.getvalue()
    assert_same(finished[2], weights(again))


def test_a_finished_run_is_not_trained_again(finished):
    config, results, trained = finished
    trainer = trainer_of(config)
    again = trainer.train()
    assert_same(trained, weights(trainer))
    assert again["after"]["accuracy"] == results["after"]["accuracy"]
    assert [row["step"] for row in read_metrics(Path(config.run.output) / "metrics.jsonl")] == [1, 2, 2, 3, 4]


def test_never_resuming_starts_anew_and_removes_what_was_there(tmp_path):
    config = toy_config(tmp_path / "run", steps=1)
    trainer_of(config).train()
    other = toy_config(tmp_path / "run", steps=1, seed=5, resume="never")
    trainer_of(other).train()
    assert load_config([str(tmp_path / "run" / "config.yaml")]).run.seed == 5


def test_other_settings_in_the_same_folder_are_refused(finished):
    config, *_ = finished
    with pytest.raises(ConfigError, match=r"with other settings \(optimizer.learning_rate was 0.001, now 0.5\)"):
        trainer_of(toy_config(config.run.output, evaluation_every=2, learning_rate=0.5))


def test_a_step_larger_than_its_task_samples_every_problem_anew(tmp_path):
    """Twelve problems, sixteen a step, two episodes each: no episode is another's copy, on any number of processes."""
    config = toy_config(
        tmp_path / "run", steps=1, episodes_per_step=32, samples_per_problem=2, updates_per_step=4, checkpoint_every=0
    )
    trainer = trainer_of(config)
    trainer.train()
    episodes = load_trajectories(Path(config.run.output) / "trajectories")
    assert len({(one.example_id, one.sample) for one in episodes}) == len(episodes) == 32
    assert len({tuple(one.token_ids.tolist()) for one in episodes}) == 32
    shares = trainer.problems.shares(0, list(episodes), 4)
    assert [len(share) for share in shares] == [8, 8, 8, 8]
    for share in shares:  # a problem's two episodes stay together
        groups = [(one.example_id, one.sample // 2) for one in share]
        assert all(groups.count(group) == 2 for group in groups)


def test_a_folder_that_is_no_run_is_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and holds no run"):
        trainer_of(toy_config(tmp_path, resume="never"))
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"divergence": "jsd"},
        {"updates_per_step": 2},
        {"estimator": "topk", "topk_tokens": 16},
        {"estimator": "sampled", "baseline": "value", "episodes_per_step": 32, "steps": 36},
    ],
)
def test_the_teacher_kl_on_the_students_own_tokens_falls(tmp_path, changes):
    settings = {"steps": 12, "episodes_per_step": 8, "learning_rate": 1e-2, "checkpoint_every": 0, **changes}
    trainer = trainer_of(toy_config(tmp_path / "run", **settings), teacher_spread=0.6)
    trainer.train()
    kl = [row["teacher/kl"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert sum(kl[-4:]) < 0.95 * sum(kl[:4])


def test_a_divergence_from_a_users_file_can_be_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from opd_env.trainer import register_divergence\n"
        "register_divergence('triangular', lambda u: (u - 1) ** 2 / (u + 1))\n"
    )
    config = toy_config(tmp_path / "run", steps=1, divergence="triangular", imports=(str(file),))
    trainer_of(config).train()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["teacher/kl"] > 0


def test_the_reward_alone_moves_the_student_only_where_a_problems_samples_differ(tmp_path):
    settings = {
        "steps": 1, "samples_per_problem": 2, "reward_coefficient": 1.0, "divergence_coefficient": 0.0,
        "estimator": "sampled",
    }  # fmt: skip
    trainer = trainer_of(toy_config(tmp_path / "run", **settings))
    start, played = weights(trainer), trainer.rollouts.take(0)
    assert {one.correct for one in played.trajectories} == {False}
    trainer._learn(0, played)
    assert_same(start, weights(trainer))
    first, *rest = played.trajectories
    trainer._learn(0, replace(played, trajectories=(replace(first, correct=True), *rest)))
    assert any(not torch.equal(start[name], value) for name, value in weights(trainer).items())
    assert {round(value, 6) for value in trainer.learner.objective.tokens.advantages_N.tolist()} == {-1.0, 0.0, 1.0}


def test_a_run_may_have_several_teachers_and_remember_what_they_said(tmp_path):
    other = loaded(7, "other", spread=0.3)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    settings = {
        "steps": 1, "estimator": "topk", "topk_tokens": 8, "teacher_cache": str(tmp_path / "cache"),
        "teacher_routes": {"calculator": str(tmp_path / "other")}, "teacher_sees_answer": True,
    }  # fmt: skip
    runs = [trainer_of(toy_config(tmp_path / name, **settings)) for name in ("one", "two")]
    for trainer in runs:
        trainer.train()
    assert_same(weights(runs[0]), weights(runs[1]))
    routed = runs[1].parts.teachers.scorer._others["calculator"]
    assert (routed.hits > 0, routed.misses) == (True, 0)  # all of it was known from the first run
    alone = trainer_of(toy_config(tmp_path / "alone", **{**settings, "teacher_routes": {}}))
    alone.train()
    assert any(not torch.equal(value, weights(alone)[name]) for name, value in weights(runs[0]).items())


def test_adapters_alone_are_trained_and_merged_into_the_saved_model(tmp_path, monkeypatch):
    student = loaded(1, "student")
    before = {name: value.clone() for name, value in student.model.named_parameters()}
    trainer = OPDTrainer(
        toy_config(tmp_path / "run", steps=2, lora=LoRASettings(rank=2), learning_rate=1e-2),
        student=student, teacher=loaded(2, "teacher", spread=0.3), console=Console(file=StringIO()),
    )  # fmt: skip
    assert all("lora_" in name for name in trainer.updater.parameters)
    model, ids = trainer.parts.student.model, torch.arange(20)[None]
    monkeypatch.setattr(Parts, "save_student", lambda parts, folder: None)
    trainer.train()
    monkeypatch.undo()
    base = {name: value for name, value in model.named_parameters() if "lora_" not in name}
    assert sum(torch.equal(value, before[_plain(name)]) for name, value in base.items()) == len(before)
    with torch.no_grad():
        expected = model(ids).logits
        trainer.parts.save_student(tmp_path / "merged")
        found = load_model(str(tmp_path / "merged")).model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _plain(name):
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def test_a_warm_start_comes_before_the_first_step(tmp_path):
    config = toy_config(tmp_path / "run", steps=1, sft_steps=3, sft_learning_rate=1e-2)
    trainer = trainer_of(config)
    start = weights(trainer)
    seen = []
    original = trainer.rollouts.play
    trainer.rollouts.play = lambda *args: (seen.append(weights(trainer)), original(*args))[1]
    trainer.train()
    assert any(not torch.equal(start[name], seen[0][name]) for name in start)
    assert trainer.updater.updates == 1


def test_a_step_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    trainer = trainer_of(toy_config(tmp_path / "run"))
    original = trainer.rollouts.play

    def spoil(step, *args):
        if step == 2:
            played = original(step, *args)
            next(iter(trainer.updater.parameters.values())).data.fill_(float("nan"))
            return played
        return original(step, *args)

    trainer.rollouts.play = spoil
    with pytest.raises(TrainingError, match=r"step 3: .*The checkpoint of step 2 is kept"):
        trainer.train()
    assert trainer.checkpoints.newest().step == 2


def test_a_full_disk_is_one_sentence_and_the_run_continues_later(finished, tmp_path, monkeypatch):
    config = toy_config(tmp_path / "run", evaluation_every=2)
    trainer = trainer_of(config)
    original, calls = trainer.checkpoints.save, []

    def save(step, files):
        calls.append(step)
        if step == 3:

            def fail(path):
                raise OSError(28, "No space left on device")

            files = {**files, "weights.safetensors": fail}
        return original(step, files)

    monkeypatch.setattr(trainer.checkpoints, "save", save)
    with pytest.raises(CheckpointError, match="No space left on device; the one of step 2 is kept"):
        trainer.train()
    again = trainer_of(config)
    again.train()
    assert_same(finished[2], weights(again))


def test_a_sampler_that_disagrees_with_the_trainer_is_reported(tmp_path):
    config = toy_config(tmp_path / "run", steps=2, max_logprob_gap=1e-12)
    trainer = trainer_of(config, student_spread=0.3)
    trainer.train()
    assert trainer.display.console.file.getvalue().count("sampler and trainer disagree by") == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"split": "test", "evaluation_split": "train"}, "split 'test' of task 'toy_sums' is for evaluation only"),
        ({"task": "toy_sum"}, "did you mean 'toy_sums'"),
        ({"tools": ("calculater",)}, "did you mean 'calculator'"),
        ({"limits": RolloutLimits(max_tokens=20, max_turn_tokens=8)}, "max_tokens=20 leaves no room for an answer"),
        ({"divergence": "jds"}, "jsd"),
        ({"trackers": ("tensorbord",)}, "no tracker is named 'tensorbord' (did you mean 'tensorboard'"),
        ({"imports": ("nowhere.py",)}, "imports names 'nowhere.py', which is no file"),
        ({"lora": LoRASettings(targets=("qkv",))}, "fits no layer of the student; its linear layers are"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_before_anything_is_written(tmp_path, changes, reason):
    with pytest.raises(ValueError) as caught:
        trainer_of(toy_config(tmp_path / "run", **changes))
    assert reason in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_tokenizer_is_refused_before_anything_is_written(tmp_path):
    teacher = loaded(2, "teacher")
    teacher = type(teacher)(teacher.model, tiny_tokenizer(tags_are_tokens=False), "teacher")
    with pytest.raises(ValueError, match="does not fit the student"):
        OPDTrainer(toy_config(tmp_path / "run"), student=loaded(1, "student"), teacher=teacher)
    assert not (tmp_path / "run").exists()
