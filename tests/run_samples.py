"""Writes a made-up run folder, as the trainer would have written it, for tests of reports."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_env.episode.store import save_trajectories
from opd_env.episode.trajectory import Trajectory
from opd_env.evaluation.counts import summarise
from tests.episode.trajectory_samples import encode, make_trajectories

CONFIG = """# config_hash: 3f2a91c07be4
task: arithmetic
student: {model: packaged:student}
teacher: {model: packaged:teacher}
objective: {divergence: reverse_kl, mode: opd_plus_centred, estimator: full}
sampling: {episodes_per_step: 64}
optimizer: {learning_rate: 0.002}
run: {steps: 100, seed: 0}
"""


def make_run(
    folder: Path, *, problems: int = 200, steps: int = 100, encode: Callable[[str], list[int]] = encode
) -> Path:
    """A finished run: a student from 40 % to 88 %, a teacher at 95 %."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    results: dict[str, Any] = {}
    for name, skill in (("before", 0.4), ("after", 0.88), ("teacher", 0.95)):
        trajectories = make_trajectories(problems, skill, encode=encode)
        results[name] = write_evaluation(folder / "evaluations" / name, trajectories)
    versions = {"python": "3.11.9", "opd-env": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    results |= {"seconds": 173.2, "seed": 0, "config_hash": "3f2a91c07be4", "versions": versions}
    (folder / "results.json").write_text(json.dumps(results))
    for step in range(steps // 4, steps, steps // 4) if steps >= 8 else ():
        skill = 0.4 + 0.48 * (1 - math.exp(-3 * step / steps))
        write_evaluation(folder / "evaluations" / f"step_{step:08d}", make_trajectories(problems, skill))
    lines = [json.dumps(metrics_row(step, steps)) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


SETTINGS = {
    "model": "packaged:student",
    "task": "arithmetic",
    "version": "1",
    "split": "test",
    "size": 200,
    "tools": ["calculator"],
    "samples": 1,
    "sampling": {"temperature": 0.0, "max_tokens": 256},
    "limits": {"max_turns": 8, "max_errors": 3, "max_turn_tokens": 256, "max_tokens": 2048},
    "seed": 0,
    "prompt_hash": "5d41402abc4b2a76",
}


def write_evaluation(folder: Path, trajectories: list[Trajectory], **settings: Any) -> dict[str, Any]:
    entry = summarise(trajectories).to_json()
    save_trajectories(trajectories, folder / "trajectories.parquet")
    (folder / "results.json").write_text(
        json.dumps(
            {
                "evaluation": entry
                | {
                    "label": "arithmetic (with tools: calculator)",
                    "settings": SETTINGS | settings,
                    "versions": {"python": "3.11.9", "opd-env": "0.1.0"},
                }
            }
        )
    )
    return entry


def metrics_row(step: int, steps: int) -> dict[str, float]:
    rng = random.Random(step)
    learnt = 1 - math.exp(-4 * step / steps)

    def noisy(value: float, noise: float = 0.05) -> float:
        return value * (1 + rng.gauss(0, noise))

    rollout_s, teacher_s, update_s = noisy(0.9), noisy(0.2), noisy(0.5)
    return {
        "step": step,
        "rollout/accuracy": min(1.0, noisy(0.38 + 0.45 * learnt, 0.08)),
        "rollout/tool_call_validity": min(1.0, noisy(0.6 + 0.38 * learnt, 0.03)),
        "rollout/malformed_rate": max(0.0, noisy(0.2 - 0.19 * learnt, 0.3)),
        "rollout/tool_error_rate": max(0.0, noisy(0.2 - 0.19 * learnt, 0.3)),
        "rollout/response_length": noisy(70 - 20 * learnt),
        "rollout/turns": noisy(2.4 - 0.4 * learnt, 0.02),
        "rollout/calls": noisy(1.4 - 0.3 * learnt, 0.03),
        "rollout/truncated_fraction": max(0.0, noisy(0.25 - 0.22 * learnt, 0.2)),
        "rollout/drift": 0,
        "teacher/kl": noisy(0.9 - 0.82 * learnt, 0.06),
        "teacher/kl_tool_call": noisy(0.7 - 0.66 * learnt, 0.06),
        "train/loss": noisy(0.9 - 0.82 * learnt, 0.06),
        "train/grad_norm": noisy(2.2 - 1.2 * learnt, 0.3),
        "train/entropy": noisy(0.6 - 0.4 * learnt),
        "train/max_abs_advantage": noisy(9, 0.2),
        "train/clip_fraction": 0.0,
        "train/learning_rate": 2e-3 * min(1.0, step / 10),
        "train/logprob_gap": abs(noisy(2e-6, 0.5)),
        "time/rollout_s": rollout_s,
        "time/tools_s": 0.02,
        "time/teacher_s": teacher_s,
        "time/update_s": update_s,
        "time/step_s": rollout_s + teacher_s + update_s,
        "tokens_per_s": noisy(2100),
    }
