"""One run of the study: train, choose a checkpoint on the validation split, report it on the test split.

Worked example::

    measure_run(arm_named("jsd_opd"), seed=0, folder=Path("runs/opd_plus_study"))       # a record of JSON values

A run that was stopped continues from its last checkpoint (the supervised arm starts again). Every evaluation uses
the same problems, so that arms and seeds can be compared problem by problem.

Test it alone: ``pytest tests/benchmarks/test_opd_plus_study.py``
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from benchmarks.opd_plus_study.arms import REFERENCE, Arm, Kind, register_control
from opd_env import evaluate, load_task
from opd_env.engines.base import SamplingParams
from opd_env.engines.local import LocalEngine
from opd_env.episode.files import whole_or_nothing
from opd_env.episode.trajectory import Trajectory
from opd_env.errors import TrainingError
from opd_env.evaluation.counts import summarise
from opd_env.evaluation.read_run import read_metrics
from opd_env.trainer import OPDTrainer
from opd_env.trainer.run.sft import expert_trajectories, sft
from opd_env.trainer.teachers.base import log_ratios

CURVES = {
    "teacher_kl": "teacher/kl",
    "grad_norm": "train/grad_norm",
    "clip_fraction": "train/clip_fraction",
    "response_length": "rollout/response_length",
    "accuracy": "rollout/accuracy",
    "max_abs_advantage": "train/max_abs_advantage",
    "entropy": "train/entropy",
}
"""Per training step, by the names of ``metrics.jsonl``."""


@dataclass(frozen=True)
class Evaluations:
    """How many problems decide and report."""

    validation: int = 60
    test: int = 200


def record_path(folder: Path, arm: Arm, seed: int) -> Path:
    """Where the record of a run is kept."""
    return folder / "records" / f"{arm.name}_{seed}.json"


def measure_run(
    arm: Arm, seed: int, folder: Path, sizes: Evaluations, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Trains and evaluates one arm with one seed, and writes its record.

    Args:
        arm: what to train.
        seed: of the problems' order, the sampling, and the evaluations at temperature 1.
        folder: of the study.
        sizes: problems per evaluation.
        changes: settings of the whole study that differ from ``study.yaml``.
    """
    register_control()
    started, cpu = time.perf_counter(), time.process_time()
    place = folder / "work" / f"{arm.name}_{seed}"
    with open(os.devnull, "w") as nowhere:
        trainer = OPDTrainer(arm.config(seed, place / "run", changes), console=Console(file=nowhere))
        run = _Run(arm, trainer, place / "weights", sizes)
        failure = run.train(folder)
    validation = {step: run.accuracy_on_validation(step) for step in run.weights}
    chosen, last = max(validation, key=lambda step: (validation[step], step)), max(validation)
    reported = {step: run.test(step) for step in {chosen, last}}
    record = {
        "arm": arm.name,
        "seed": seed,
        "failure": failure,
        "validation": {str(step): accuracy for step, accuracy in validation.items()},
        "chosen_step": chosen,
        "chosen": reported[chosen],
        "final": reported[last],
        "tokens": run.tokens,
        "curves": {name: [shortened(row.get(key)) for row in run.metrics()] for name, key in CURVES.items()},
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }
    path = record_path(folder, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing(path) as unfinished:
        unfinished.write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
    if place.exists():
        shutil.rmtree(place)
    return record


class _Run:
    """A student, what it was at each checkpoint, and what it could do then."""

    def __init__(self, arm: Arm, trainer: OPDTrainer, folder: Path, sizes: Evaluations) -> None:
        self.weights: dict[int, Path | None] = {}
        """Files by step; None for the weights that the model has."""
        self.tokens = 0
        """That the student has learnt from."""
        self._arm, self._trainer, self._folder, self._sizes = arm, trainer, folder, sizes
        parts = trainer.parts
        self._model = (parts.teacher.loaded if arm.kind is Kind.TEACHER else parts.student).model
        self._engine = LocalEngine(self._model, parts.chat.stop_token_ids, parts.chat.vocab_size, 64)

    def train(self, study: Path) -> str | None:
        """Trains; returns why training could not go on, if it could not."""
        failure = None
        match self._arm.kind:
            case Kind.ON_POLICY:
                try:
                    self._trainer.train()
                except TrainingError as error:
                    failure = str(error)
                    self._keep(len(self.metrics()))
                for step in self._trainer.checkpoints.steps():
                    self.weights[step] = self._trainer.checkpoints.folder / f"step_{step:08d}" / "weights.safetensors"
                self.tokens = sum(row["rollout/sampled_tokens"] for row in self.metrics())
            case Kind.SUPERVISED:
                reference = study / "records" / f"{REFERENCE}_{self._trainer.config.run.seed}.json"
                self._supervise(json.loads(reference.read_text(encoding="utf-8"))["tokens"])
            case _:
                self.weights[0] = None
        return failure

    def _supervise(self, tokens: int) -> None:
        """As many updates as the training loop would take, on ``tokens`` expert tokens in all."""
        config, trainer = self._trainer.config, self._trainer
        updates = config.run.steps * config.optimizer.updates_per_step
        experts = expert_trajectories(
            trainer.parts.task,
            trainer.parts.chat,
            count=config.run.steps * config.sampling.episodes_per_step,
            seed=config.run.seed,
        )
        mean = sum(expert.num_sampled for expert in experts) / len(experts)
        done = sft(
            trainer.updater, experts, steps=updates, episodes_per_step=round(tokens / updates / mean),
            learning_rate=config.optimizer.learning_rate, warmup=config.optimizer.warmup_steps,
            schedule=config.optimizer.schedule, seed=config.run.seed,
        )  # fmt: skip
        for number, update in enumerate(done, start=1):
            self.tokens += update.num_tokens
            step, rest = divmod(number, config.optimizer.updates_per_step)
            if rest == 0 and (step == config.run.steps or step % config.run.checkpoint_every == 0):
                self._keep(step)

    def _keep(self, step: int) -> None:
        path = self._folder / f"{step}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach() for name, value in self._trainer.updater.parameters.items()}, path)
        self.weights[step] = path

    def accuracy_on_validation(self, step: int) -> float:
        """Share of validation problems solved, greedy."""
        played = self._play(step, "validation", self._sizes.validation, 0.0)
        return sum(one.correct for one in played) / len(played)

    def test(self, step: int) -> dict[str, Any]:
        """What is reported of the weights at ``step``: greedy, and sampled at temperature 1 as in training."""
        greedy = self._play(step, "test", self._sizes.test, 0.0)
        sampled = self._play(step, "test", self._sizes.test, 1.0)
        summary = summarise(greedy)
        log_u = [value for episode in log_ratios(self._trainer.parts.teacher, sampled).values() for value in episode]
        return {
            "greedy": bits(one.correct for one in greedy),
            "sampled": bits(one.correct for one in sampled),
            "over_call": bits(len(one.calls) > one.difficulty for one in greedy),
            "tool_call_validity": shortened(summary.to_json()["tool_call_validity"]),
            "truncated": shortened(summary.truncated.value),
            "response_length": shortened(summary.sampled_tokens_per_episode),
            "teacher_kl": shortened(-sum(log_u) / len(log_u)),
        }

    def metrics(self) -> list[dict[str, Any]]:
        """One entry per training step of the loop."""
        return read_metrics(self._trainer.folder.path / "metrics.jsonl")

    def _play(self, step: int, split: str, problems: int, temperature: float) -> Sequence[Trajectory]:
        file, config, parts = self.weights[step], self._trainer.config, self._trainer.parts
        if file is not None:
            weights = load_file(file)
            with torch.no_grad():
                for name, value in self._trainer.updater.parameters.items():
                    value.copy_(weights[name])
        played = evaluate(
            load_task(config.task, split, **config.task_options), self._engine, parts.chat, limit=problems,
            limits=config.sampling.limits, sampling=SamplingParams(temperature=temperature), seed=config.run.seed,
        )  # fmt: skip
        if played.errors:
            raise RuntimeError(f"{len(played.errors)} episodes failed; the first: {played.errors[0].message}")
        return played.trajectories


def bits(values: Iterable[bool]) -> str:
    """One character a problem: ``"0110"``."""
    return "".join(str(int(value)) for value in values)


def shortened(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None else float(f"{value:.4g}")
