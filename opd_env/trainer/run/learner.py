"""One step's learning: the teacher scores the episodes, the student takes its updates, and what happened is counted.

Worked example::

    learner = Learner(config, parts, updater, problems)
    metrics = learner.learn(step, played)            # of all processes
    MetricsLog(run / "metrics.jsonl").write({"step": 1, **metrics})

``teacher/kl`` is KL(student || teacher) on the student's own tokens, whatever divergence is trained: it must fall.
Rates without a case (no tool call at all) are left out of a line rather than invented.

Test it alone: ``pytest tests/trainer/run/test_loop.py tests/trainer/run/test_learner.py``
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray

from opd_env.episode.files import explained, write_whole
from opd_env.episode.trajectory import StopReason, Trajectory
from opd_env.errors import TrainingError
from opd_env.evaluation.counts import RATES, tally
from opd_env.evaluation.read_run import read_metrics
from opd_env.formats.base import TokenKind
from opd_env.trainer.learn.objective import OPDObjective, TokenValues
from opd_env.trainer.learn.settings import ObjectiveSettings
from opd_env.trainer.learn.update import Updater, learning_rate_at
from opd_env.trainer.math.advantages import clip_fraction
from opd_env.trainer.math.loss import loss_statistics
from opd_env.trainer.run.config import OPDConfig
from opd_env.trainer.run.rollouts import StepEpisodes, StepProblems
from opd_env.trainer.run.setup import Parts


class Learner:
    """Turns a step's episodes into updates of the student.

    Args:
        config: all settings.
        parts: the teacher and the format.
        updater: holds the student.
        problems: which update learns from which problem.
    """

    def __init__(self, config: OPDConfig, parts: Parts, updater: Updater, problems: StepProblems) -> None:
        self._config = config
        self._updater = updater
        self._problems = problems
        self.objective = OPDObjective(
            config.objective,
            parts.teachers.scorer,
            parts.chat.vocab_size,
            temperature=config.sampling.temperature,
            samples_per_problem=config.sampling.samples_per_problem,
        )

    def learn(self, step: int, played: StepEpisodes) -> dict[str, Any]:
        """Lets the teacher score a step's episodes and takes the step's updates. Every process calls it.

        Args:
            step: finished steps.
            played: this process's episodes.

        Returns:
            The metrics of the step, over all processes. ``train/staleness`` is the mean over tokens of the updates that
            the student had taken between sampling a token and learning from it.

        Raises:
            TrainingError: the teacher cannot score an episode, or the loss or the gradient is not finite.
        """
        started = time.perf_counter()
        age = self._updater.updates - played.policy
        teacher_seconds, updates, seen, tokens = 0.0, [], [], []
        for share in self._problems.shares(step, played.trajectories, self._config.optimizer.updates_per_step):
            try:
                self.objective.begin(share, progress=(step + 1) / self._config.run.steps)
                updates.append(self._updater.update(self.objective.rows, self.objective, self._rate()))
            except (TrainingError, ValueError) as error:
                raise TrainingError(f"step {step + 1}: {error}") from error
            finally:
                self.objective.end()
            teacher_seconds += self.objective.teacher_seconds
            seen += share
            tokens.append(self.objective.tokens)
        update_seconds = time.perf_counter() - started - teacher_seconds
        everyone = gather_object([(seen, tokens)])
        trajectories = [trajectory for theirs, _ in everyone for trajectory in theirs]
        values = TokenValues.joined([part for _, theirs in everyone for part in theirs])
        by_update = [TokenValues.joined(parts) for parts in zip(*(theirs for _, theirs in everyone), strict=True)]
        first = by_update[0] if age == 0 else None
        sampled = sum(trajectory.num_sampled for trajectory in trajectories)
        staleness = sum((age + n) * len(part.logprobs_N) for n, part in enumerate(by_update)) / max(1, sampled)
        return {
            **rollout_metrics(trajectories),
            "rollout/failed_episodes": len(gather_object(list(played.errors))),
            "rollout/sampled_tokens": sampled,
            **teacher_metrics(trajectories, values),
            "train/loss": sum(update.loss for update in updates) / len(updates),
            "train/grad_norm": max(update.grad_norm for update in updates),
            "train/learning_rate": updates[-1].learning_rate,
            "train/staleness": staleness,
            **token_metrics(values, first, self._config.objective),
            "time/rollout_s": played.seconds,
            "time/rollout_tail_share": played.tail_seconds / max(played.seconds, 1e-9),
            "time/tools_s": played.tool_seconds,
            "time/teacher_s": teacher_seconds,
            "time/update_s": update_seconds,
        }

    def _rate(self) -> float:
        optimizer = self._config.optimizer
        return learning_rate_at(
            self._updater.updates,
            peak=optimizer.learning_rate,
            warmup=optimizer.warmup_steps,
            total=self._config.run.steps * optimizer.updates_per_step,
            schedule=optimizer.schedule,
        )


_ROLLOUT: Mapping[str, tuple[str, ...]] = {
    "accuracy": RATES["accuracy"],
    "tool_call_validity": RATES["tool_call_validity"],
    "malformed_rate": RATES["malformed"],
    "over_call_rate": RATES["over_call"],
    "truncated_fraction": RATES["truncated"],
    "calls": ("calls",),
    "turns": ("turns",),
    "response_length": ("sampled_tokens",),
    "drift": ("drift",),
    "rows_per_trajectory": ("rows",),
}
"""Names of metrics, and the sums of a tally that are divided; by the number of episodes where there is one."""
_KINDS = {"text": TokenKind.TEXT, "thinking": TokenKind.THINKING, "tool_call": TokenKind.TOOL_CALL}


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """How the student acts, counted as every evaluation counts (docs/evaluation.md), and how long episodes took."""
    table = tally(trajectories)
    found = {name: table.quotient(*columns) for name, columns in _ROLLOUT.items()}
    found["tool_error_rate"] = table.quotient("parsed", "judged") - table.quotient("answered", "judged")
    found["end_of_turn_rate"] = 1 - table.quotient("cut_turns", "turns")
    if trajectories:
        found["time_limit_fraction"] = table.stop_reasons[StopReason.TIME] / len(trajectories)
        for name, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
            found[f"episode_seconds_{name}"] = float(np.quantile([one.seconds for one in trajectories], share))
    return {f"rollout/{name}": value for name, value in found.items() if not math.isnan(value)}


def teacher_metrics(trajectories: Sequence[Trajectory], tokens: TokenValues) -> dict[str, float]:
    """KL to the teacher over all sampled tokens, by turn, by kind of token and by quarter of the episode."""
    kl_N = tokens.kl_N.double().numpy()
    turn_N = _per_token([one.turn[one.sampled] for one in trajectories])
    kind_N = _per_token([one.kind[one.sampled] for one in trajectories])
    quarter_N = _per_token([4 * np.arange(one.num_sampled) // max(1, one.num_sampled) for one in trajectories])
    groups = {"kl": np.ones(len(kl_N), dtype=np.bool_)}
    groups |= {f"kl_turn_{turn}": turn_N == turn for turn in sorted(set(turn_N.tolist()))}
    groups |= {f"kl_{name}": kind_N == kind for name, kind in _KINDS.items()}
    groups |= {f"kl_quarter_{quarter + 1}": quarter_N == quarter for quarter in range(4)}
    return {f"teacher/{name}": float(kl_N[mask].mean()) for name, mask in groups.items() if mask.any()}


def token_metrics(tokens: TokenValues, first: TokenValues | None, objective: ObjectiveSettings) -> dict[str, float]:
    """Entropy, advantages, mean weight, importance ratios, and how far sampler and trainer disagree.

    Args:
        tokens: of all updates of a step.
        first: of its first update, for the log-prob gap; None when the student was not the one that sampled any more.
        objective: the bounds in use.
    """
    everything = torch.ones_like(tokens.logprobs_N, dtype=torch.bool)
    statistics = loss_statistics(
        tokens.logprobs_N,
        tokens.behaviour_logprobs_N,
        tokens.advantages_N,
        everything,
        clip_ratio=objective.clip_ratio,
        truncate_weight=objective.truncate_weight,
    )
    bound = objective.clip_log_ratio
    gaps = {}
    if first is not None:
        gap_N = (first.logprobs_N - first.behaviour_logprobs_N).abs()
        gaps = {"train/logprob_gap": float(gap_N.mean()), "train/logprob_gap_max": float(gap_N.max())}
    return {
        "train/entropy": float(tokens.entropy_N.mean()),
        "train/max_abs_advantage": statistics.advantage_max_abs,
        "train/mean_advantage": statistics.advantage_mean,
        "train/token_weight": float(tokens.weights_N.mean()),
        "train/clip_fraction": 0.0 if bound is None else clip_fraction(tokens.log_ratio_N, everything, bound),
        "train/ratio_bounded_fraction": statistics.ratio_bounded_fraction,
        "train/ratio_p99": statistics.ratio_p99,
        "train/ratio_log_mean": statistics.ratio_log_mean,
        "train/ratio_log_max": statistics.logprob_gap_max,
        "train/ratio_sample_size": statistics.ratio_sample_size,
        **gaps,
    }


class MetricsLog:
    """``metrics.jsonl``: one object per step, on disk when ``write`` returns.

    Args:
        path: continued if it exists.
        last_step: lines of later steps are dropped (a run that continues from a checkpoint writes them again);
            so is a last line that a kill cut short.
    """

    def __init__(self, path: str | Path, last_step: int = 0) -> None:
        self.path = Path(path)
        lines = [json.dumps(row) + "\n" for row in read_metrics(self.path) if row["step"] <= last_step]
        write_whole(self.path, "".join(lines))

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one step; numbers that are not finite become null, which every JSON reader knows."""
        values = {name: _json(value) for name, value in row.items()}
        with explained(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def shown_of(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What the progress display shows of a step."""
    shown = {"KL": f"{metrics['teacher/kl']:.3f}", "accuracy": f"{metrics['rollout/accuracy']:.2f}"}
    return shown | {"tok/s": f"{metrics['tokens_per_s']:,.0f}", "s/step": f"{metrics['time/step_s']:.2f}"}


def _per_token(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
