"""Training with a real vLLM: one in each of several processes, one step ahead, and what a terminal shows of it.

Run by ``make test-vllm``; elsewhere skipped.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from opd_env.engines.models import load_model
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.store import load_trajectories
from opd_env.evaluation.read_run import read_metrics
from opd_env.trainer.run.config import OPDConfig
from opd_env.trainer.run.loop import OPDTrainer
from tests.engines.test_vllm import OPTIONS, TOLERANCE, gap
from tests.engines.vllm_server import Server
from tests.trainer.learn.distributed_updates import accelerator_of
from tests.trainer.settings import config_of
from tests.trainer.together import ROOT, ends, launcher_environment, together

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; run make test-vllm"),
]


def vllm_config(folder: Path, **changes: Any) -> OPDConfig:
    settings: dict[str, Any] = {
        "student": "packaged:student", "teacher": "packaged:teacher", "task": "arithmetic", "steps": 3,
        "episodes_per_step": 8, "estimator": "sampled", "engine": "vllm", "learning_rate": 1e-4,
        "evaluation_problems": 2, "trackers": (), "vllm_options": OPTIONS, "concurrent_episodes": 8,
        "output": str(folder), "limits": RolloutLimits(max_turns=4, max_turn_tokens=64, max_tokens=400),
    }  # fmt: skip
    return config_of(**{**settings, **changes})


def train(config: OPDConfig) -> OPDTrainer:
    trainer = OPDTrainer(config, console=Console(file=StringIO()))
    trainer.train()
    return trainer


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]


def episodes_of(folder: Path) -> dict[tuple[str, str, int], list[int]]:
    """Tokens of all stored episodes, by step and problem; which process played one does not matter."""
    return {
        (path.stem.partition("_process")[0], one.example_id, one.sample): one.token_ids.tolist()
        for path in (folder / "trajectories").iterdir()
        for one in load_trajectories(path)
    }


def run_in_two(rank: int, folder: Path, kind: str) -> None:
    accelerator_of(kind)
    train(vllm_config(folder, teacher_engine="vllm"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(vllm_config(folder, teacher_engine="vllm"))
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_with_a_vllm_in_each_learn_what_one_learns(tmp_path: Path, alone: Path, kind: str) -> None:
    """Student and teacher in vLLM: the same tokens are sampled from weights that follow the same three updates."""
    two, environment = tmp_path / "two", launcher_environment("fsdp2.yaml")
    sharding = {name: value for name, value in environment.items() if "FSDP" in name}
    with together(2, tmp_path, run_in_two, two, kind, environment=sharding) as lives:
        assert ends(lives, within=500) == [0, 0]
    assert len(list((two / "trajectories").iterdir())) == 6
    assert episodes_of(two) == episodes_of(alone)
    for ours, theirs in zip(steps_of(two), steps_of(alone), strict=True):
        assert ours["train/logprob_gap"] < TOLERANCE
        for name in ("teacher/kl", "train/loss", "train/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    first = dict(load_model("packaged:student").model.named_parameters())
    other = dict(load_model(str(alone / "model")).model.named_parameters())
    moved = 0.0
    for name, value in load_model(str(two / "model")).model.named_parameters():
        # AdamW blows up the rounding of gradients near 0, in proportion to the learning rate.
        torch.testing.assert_close(value, other[name], rtol=0, atol=2e-5, msg=name)
        moved = max(moved, float((value - first[name]).detach().abs().max()))
    assert moved > 2e-4


def failing_in_one(rank: int, folder: Path) -> None:
    accelerator_of("ddp")
    trainer = OPDTrainer(vllm_config(folder), console=Console(file=StringIO()))
    if rank == 0:
        trainer.rollouts.play = None  # type: ignore[assignment, method-assign]
    trainer.train()


def test_an_error_in_the_process_that_all_meet_at_is_told_though_its_vllm_is_closed_first(tmp_path: Path) -> None:
    with together(2, tmp_path, failing_in_one, tmp_path / "run") as lives:
        assert ends(lives, within=300) == [1, 1]
        assert "EndedByAnother: process 0" in lives[1].text()
        assert "'NoneType' object is not callable" in lives[1].text()


@pytest.mark.parametrize("where", ["in process", "server"])
def test_a_step_ahead_is_sampled_by_the_student_of_one_step_before(
    tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    changes: dict[str, Any] = {"rollout_ahead": True, "ratio_policy": "current", "learning_rate": 1e-3}
    if where == "server":
        server: Server = request.getfixturevalue("vllm_server")
        changes |= {"engine": server.url, "vllm_options": {}}
    config = vllm_config(tmp_path / "run", **changes)
    trainer = OPDTrainer(config, console=Console(file=StringIO()))
    students: list[Any] = []
    gaps: list[list[float]] = []
    learn = trainer._learn

    def watched(step: int, played: Any) -> Any:
        students.append(copy.deepcopy(trainer.parts.student.model))
        gaps.append([gap(student, played) for student in students])
        return learn(step, played)

    trainer._learn = watched  # type: ignore[method-assign]
    trainer.train()
    (first,), (before, now), (_, before_again, now_again) = gaps
    assert max(first, before, before_again) < TOLERANCE
    assert min(now, now_again) > 10 * TOLERANCE
    assert [row["train/staleness"] for row in steps_of(tmp_path / "run")] == [0, 1, 1]


def test_a_terminal_shows_the_run_and_nothing_of_vllm(tmp_path: Path) -> None:
    settings = {"student": "packaged:student", "teacher": "packaged:teacher", "task": "arithmetic", "steps": 2}
    settings |= {"engine": "vllm", "evaluation_problems": 2, "episodes_per_step": 4, "limits": {"max_tokens": 400}}
    settings |= {"vllm_options": OPTIONS, "trackers": [], "output": str(tmp_path / "run"), "concurrent_episodes": 4}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "opd_env.cli", "train", str(tmp_path / "run.yaml")]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_LOGGING_LEVEL"}
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, text=True, timeout=400,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for line in ("before: accuracy", "training 2/2", "done: packaged:student"):
        assert line in done.stdout
    for noise in ("INFO", "WARNING", "Loading safetensors", "RotaryEmbedding", "FutureWarning"):
        assert noise not in done.stdout
