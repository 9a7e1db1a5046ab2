"""What does sampling one step ahead gain? Tokens per second of whole training steps, against the same in turn.

Two engines. ``paced`` stands for a server on another device: a step takes 40 ms for up to 64 turns of 48 tokens, and no
processor. ``local`` samples on the processors that training needs, too. Both train the packaged student::

    OMP_NUM_THREADS=1 python benchmarks/rollout_ahead.py --engine paced --steps 8 --runs 3
    OMP_NUM_THREADS=1 python benchmarks/rollout_ahead.py --engine local --steps 8 --runs 3

The runs of a pair alternate, so that a busy machine slows both. First steps are left out: they are in turn in both. The
bound is what a step would take if the shorter of rollout and learning were free.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from slow_tools import TURN_TOKENS, PacedEngine

from opd_env.engines.models import load_model
from opd_env.evaluation.read_run import read_metrics
from opd_env.messages import assistant
from opd_env.settings.fields import build
from opd_env.trainer import OPDConfig, OPDTrainer
from opd_env.trainer.run import loop


class PacedPolicy(PacedEngine):
    """Answers in every turn, with as many tokens as it takes the time for."""

    def __init__(self, chat: Any) -> None:
        super().__init__(chat, 64)
        self.call = self.answer = chat.render_assistant(assistant("1 " * (TURN_TOKENS // 2)))


def measure(folder: Path, engine: str, steps: int, episodes: int, *, ahead: bool) -> dict[str, float]:
    """Medians over the steps of one run."""
    limits = {"max_turn_tokens": 64, "max_tokens": 512, "max_turns": 4}
    config = build(OPDConfig, {
        "student": {"model": "packaged:student"}, "teacher": {"model": "packaged:teacher"}, "task": "arithmetic",
        "sampling": {"episodes_per_step": episodes, "rollout_ahead": ahead, "limits": limits},
        "evaluation": {"problems": 1},
        "run": {"steps": steps, "checkpoint_every": 0, "output": str(folder), "trackers": ()},
    })  # fmt: skip
    parts = {"student": load_model("packaged:student"), "teacher": load_model("packaged:teacher")}
    if engine == "paced":
        loop.make_engine = lambda config, student, chat, folder: PacedPolicy(chat)
    OPDTrainer(config, **parts, console=Console(file=StringIO())).train()
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row][1:-1]
    rows = [row | {"rollout": row.get("time/rollout_ahead_s", row["time/rollout_s"])} for row in rows]
    names = ("tokens_per_s", "time/step_s", "rollout", "time/update_s", "time/teacher_s", "train/staleness")
    return {name: statistics.median(row[name] for row in rows) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps one step ahead, against the same in turn.")
    parser.add_argument("--engine", choices=("paced", "local"), default="paced")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    gains = []
    with tempfile.TemporaryDirectory() as folder:
        for run in range(args.runs):
            found = {}
            for name, ahead in (("in turn", False), ("ahead", True)):
                path = Path(folder) / f"{run}-{ahead}"
                row = found[name] = measure(path, args.engine, args.steps, args.episodes, ahead=ahead)
                learn = row["time/update_s"] + row["time/teacher_s"]
                print(
                    f"{name:8s} {row['tokens_per_s']:7.0f} tokens/s, step {row['time/step_s']:.2f} s: rollout "
                    f"{row['rollout']:.2f} s, learning {learn:.2f} s, staleness {row['train/staleness']:.0f}"
                )
            turn = found["in turn"]
            learn = turn["time/update_s"] + turn["time/teacher_s"]
            bound = turn["time/step_s"] / max(turn["rollout"], learn)
            gains.append(found["ahead"]["tokens_per_s"] / turn["tokens_per_s"])
            print(f"ahead / in turn: {gains[-1]:.2f} (bound {bound:.2f})")
    print(f"median of {args.runs}: {statistics.median(gains):.2f}")


if __name__ == "__main__":
    main()
