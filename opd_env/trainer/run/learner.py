"""One step's learning: the teacher scores the episodes, the student takes its updates, and what happened is counted.

Worked example::

    learner = Learner(config, parts, updater, problems)
    metrics = learner.learn(step, played)            # of all processes, as a line of metrics.jsonl holds them

Test it alone: ``pytest tests/trainer/run/test_loop.py``
"""

from __future__ import annotations

import time
from typing import Any

from accelerate.utils import gather_object

from opd_env.errors import TrainingError
from opd_env.trainer.learn.objective import OPDObjective, TokenValues
from opd_env.trainer.learn.update import Updater, learning_rate_at
from opd_env.trainer.run.config import OPDConfig
from opd_env.trainer.run.metrics import rollout_metrics, teacher_metrics, token_metrics
from opd_env.trainer.run.problems import StepProblems
from opd_env.trainer.run.rollouts import StepEpisodes
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
