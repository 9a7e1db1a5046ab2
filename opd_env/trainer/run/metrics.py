"""What to watch while a student learns, by grouped names, one JSON line per step.

Worked example::

    log = MetricsLog(run / "metrics.jsonl")
    log.write({"step": 1, **rollout_metrics(trajectories), **teacher_metrics(trajectories, tokens)})

``teacher/kl`` is KL(student || teacher) on the student's own tokens, whatever divergence is trained: it must
fall. Rates without a case (no tool call at all) are left out of a line rather than invented.

Test it alone: ``pytest tests/trainer/run/test_metrics.py``
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opd_env.episode.files import explained, write_whole
from opd_env.episode.trajectory import StopReason, Trajectory
from opd_env.evaluation.counts import RATES, tally
from opd_env.evaluation.read_run import read_metrics
from opd_env.formats.base import TokenKind
from opd_env.trainer.learn.objective import TokenValues
from opd_env.trainer.learn.settings import ObjectiveSettings
from opd_env.trainer.math.advantages import clip_fraction
from opd_env.trainer.math.loss import loss_statistics

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
