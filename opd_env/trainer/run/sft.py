"""Supervised warm start: the student learns to write what experts wrote, by the same masks as on-policy training.

Worked example::

    experts = expert_trajectories(task, chat, count=640, seed=0)
    for step in sft(updater, experts, steps=10, episodes_per_step=64, learning_rate=1e-3, seed=0):
        print(step.loss)

``L = -(1/N) Σ log p(token)`` over the tokens that the expert wrote; prompts and tool output are context only.

Test it alone: ``pytest tests/trainer/run/test_sft.py``
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from opd_env.episode.expert import play_expert
from opd_env.episode.trajectory import Trajectory
from opd_env.formats import ChatFormat
from opd_env.report.display import Display
from opd_env.tasks import Task, require_trainable
from opd_env.tools import Tool
from opd_env.trainer.batch import Head, MicroBatch, rows_of
from opd_env.trainer.learn.settings import Schedule
from opd_env.trainer.learn.update import Update, Updater, learning_rate_at
from opd_env.trainer.math.logprobs import positions_per_chunk, token_logprobs
from opd_env.trainer.run.config import OPDConfig
from opd_env.trainer.run.rollouts import problem_at
from opd_env.trainer.run.setup import Parts


def supervised_objective(batch: MicroBatch, hidden_NH: Tensor, head: Head, num_tokens: float) -> Tensor:
    """``-(1/N) Σ log p``; see ``Objective``."""
    with torch.no_grad():
        chunk_size = positions_per_chunk(head(hidden_NH[:1]).shape[1])
    return -token_logprobs(hidden_NH, head, batch.targets_N, chunk_size=chunk_size).logprobs_N.sum() / num_tokens


def expert_trajectories(
    task: Task, chat: ChatFormat, *, count: int, tools: Sequence[str | Tool] | None = None, seed: int = 0
) -> list[Trajectory]:
    """Expert episodes of up to ``count`` examples in an order that ``seed`` fixes; those that do not hold are left out.

    Raises:
        ValueError: the split is not for training, or no example has an expert that holds.
    """
    require_trainable(task)
    order = np.random.default_rng(seed).permutation(len(task))
    played = (play_expert(task, int(index), chat, tools) for index in order[:count])
    trajectories = [trajectory for trajectory in played if trajectory is not None]
    if not trajectories:
        raise ValueError(f"task {task.name!r} has no expert whose calls all work, so there is nothing to imitate")
    return trajectories


def sft(
    updater: Updater,
    trajectories: Sequence[Trajectory],
    *,
    steps: int,
    episodes_per_step: int,
    learning_rate: float,
    warmup: int = 0,
    schedule: Schedule = Schedule.CONSTANT,
    seed: int = 0,
) -> Iterator[Update]:
    """Trains on ``trajectories``, epoch after epoch, each in a new order; yields after every step.

    Args:
        updater: holds the student; of several processes, each takes its share of a step's episodes.
        trajectories: the same on every process.
        steps: optimiser updates.
        episodes_per_step: over all processes.
        learning_rate: the highest.
        warmup: updates over which it rises.
        schedule: what it does then, over ``steps``.
        seed: of the order.
    """
    rows = [rows_of(trajectory) for trajectory in trajectories]
    rank, processes = updater.accelerator.process_index, updater.accelerator.num_processes
    for step in range(steps):
        places = range(step * episodes_per_step + rank, (step + 1) * episodes_per_step, processes)
        mine = [row for place in places for row in rows[problem_at(place, len(rows), seed)]]
        rate = learning_rate_at(step, peak=learning_rate, warmup=warmup, total=steps, schedule=schedule)
        yield updater.update(mine, supervised_objective, rate)


def warm_start(config: OPDConfig, parts: Parts, updater: Updater, display: Display) -> None:
    """The supervised steps that ``config`` asks for before distillation; the optimiser starts anew after them."""
    if not config.run.sft_steps:
        return
    count = min(len(parts.task), config.run.sft_steps * config.sampling.episodes_per_step)
    experts = expert_trajectories(parts.task, parts.chat, count=count, tools=config.tools, seed=config.run.seed)
    advance = display.phase("warm start", config.run.sft_steps)
    steps = sft(
        updater,
        experts,
        steps=config.run.sft_steps,
        episodes_per_step=config.sampling.episodes_per_step,
        learning_rate=config.optimizer.sft_learning_rate,
        seed=config.run.seed,
    )
    for number, update in enumerate(steps, start=1):
        advance(number, {"loss": f"{update.loss:.3f}"})
    updater.forget()
