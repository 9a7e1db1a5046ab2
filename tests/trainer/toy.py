"""A task, models and trajectories small enough to train in a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opd_env.engines.models import LoadedModel
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.trajectory import StopReason, Trajectory, TurnRecord
from opd_env.formats.base import TokenKind
from opd_env.messages import ToolCall, assistant, tool_message, user
from opd_env.tasks import Example, Task, grade_number, register_task
from opd_env.trainer import batch
from opd_env.trainer.batch import Row
from opd_env.trainer.run.config import OPDConfig
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.settings import config_of


@register_task("toy_sums")
class ToySums(Task):
    """What is i + 1?, with a calculator."""

    version = "1"
    tools = ("calculator",)

    def __len__(self) -> int:
        return 12

    def example(self, index: int) -> Example:
        shift = 0 if self.split == "train" else 100
        question = f"What is {index + shift} + 1?"
        return Example(id=f"{self.split}-{index}", messages=(user(question),), answer=str(index + shift + 1))

    def grade(self, example, answer, turns=()):
        return grade_number(answer, example.answer)

    def expert(self, example):
        expression = example.messages[-1]["content"].removeprefix("What is ").removesuffix("?")
        return [
            assistant("", [ToolCall("calculator", {"expression": expression})]),
            tool_message("calculator", example.answer),
            assistant(f"The answer is {example.answer}."),
        ]


def loaded(seed: int, name: str = "tiny", spread: float = 0.02, **config: Any) -> LoadedModel:
    """A random model; the larger ``spread``, the further two of them are apart."""
    return LoadedModel(tiny_llama(seed=seed, initializer_range=spread, **config), tiny_tokenizer(), name)


def toy_config(folder: Any, **changes: Any) -> OPDConfig:
    settings: dict[str, Any] = {
        "student": "student", "teacher": "teacher", "task": "toy_sums", "steps": 4, "episodes_per_step": 4,
        "evaluation_problems": 2, "checkpoint_every": 1, "trackers": (), "output": str(folder),
        "limits": RolloutLimits(max_turns=2, max_turn_tokens=8, max_tokens=160),
    }  # fmt: skip
    return config_of(**{**settings, **changes})


def made_trajectory(seed: int, prompt: int = 5, turns: tuple[int, ...] = (3, 2), tool: int = 2) -> Trajectory:
    """Random tokens: a prompt, then turns of the given lengths with tool output between them."""
    rng = np.random.default_rng(seed)
    kinds, numbers, records, at = [TokenKind.PROMPT] * prompt, [0] * prompt, [], prompt
    for number, length in enumerate(turns, start=1):
        kinds += [TokenKind.TEXT] * length
        records.append(TurnRecord(at, at + length, "text"))
        at += length
        if number < len(turns):
            kinds += [TokenKind.TOOL_OUTPUT] * tool
            at += tool
        numbers += [number] * (at - len(numbers))
    kind = np.array(kinds, dtype=np.uint8)
    sampled = kind == TokenKind.TEXT
    return Trajectory(
        task="toy_sums", example_id=f"train-{seed % 12}", sample=0,
        token_ids=rng.integers(0, len(tiny_tokenizer()), len(kind)).astype(np.int32), sampled=sampled, kind=kind,
        turn=np.array(numbers, dtype=np.int16),
        logprobs=np.where(sampled, -rng.random(len(kind)) - 4, 0).astype(np.float32),
        turns=tuple(records), stop_reason=StopReason.ANSWER, answer="text", correct=False,
    )  # fmt: skip


def naive_logprobs(model: Any, rows: list[tuple[list[int], list[bool]]], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs ``[N, V]`` before each sampled token: one row at a time, all logits, an explicit loop."""
    found = []
    for ids, sampled in rows:
        logits = model(torch.tensor([ids])).logits[0, :, : len(tiny_tokenizer())]
        logprobs = (logits / temperature).log_softmax(-1)
        found += [logprobs[t - 1] for t in range(1, len(ids)) if sampled[t]]
    return torch.stack(found)


def row_of(trajectory: Trajectory, prefixes: Sequence[Sequence[int]] | None = None) -> Row:
    """The only row of a trajectory."""
    (row,) = batch.rows_of(trajectory, prefixes)
    return row


def rows_of(trajectories: list[Trajectory]) -> list[tuple[list[int], list[bool]]]:
    return [(one.token_ids.tolist(), one.sampled.tolist()) for one in trajectories]


def targets_of(trajectories: list[Trajectory]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([one.token_ids[one.sampled] for one in trajectories])).long()
