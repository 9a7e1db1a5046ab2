"""Evaluations on the held-out split: before, during and after training, and of the teacher.

Each has a folder ``evaluations/NAME`` in the run, and continues there after a kill. For the student before and after
training, ``log_ratios.json`` tells what the teacher thinks of every token; the report shows it.

Test it alone: ``pytest tests/trainer/run/test_loop.py``
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opd_env.engines.base import Engine, SamplingParams
from opd_env.evaluation.result import EvaluationResult
from opd_env.evaluation.run import evaluate
from opd_env.formats import ChatFormat
from opd_env.report.display import Display
from opd_env.trainer.run.config import OPDConfig
from opd_env.trainer.run.folder import RunFolder
from opd_env.trainer.run.processes import on_main
from opd_env.trainer.run.setup import Parts
from opd_env.trainer.teachers.base import log_ratios

TEACHER = "teacher"
"""The evaluation that is played with the teacher's prompts; those of other teachers begin so."""
_WITH_LOG_RATIOS = ("before", "after")


class HeldOut:
    """Evaluates the models of a run. The first process plays for all; the others wait for its numbers."""

    def __init__(self, config: OPDConfig, parts: Parts, folder: RunFolder, accelerator: Any, display: Display) -> None:
        self._config = config
        self._parts = parts
        self._folder = folder
        self._accelerator = accelerator
        self._display = display

    def evaluate(self, name: str, engine: Engine, model: str) -> dict[str, Any]:
        """Plays the held-out problems.

        Args:
            name: ``before``, ``after``, ``step_…``, ``teacher`` or ``teacher_2`` …
            engine: samples the model's turns; idle.
            model: what to call the model in the results.

        Returns:
            What ``Summary.to_json`` gives, and ``failed_episodes``.
        """

        def play() -> dict[str, Any]:
            result = self._play(name, engine, model)
            self._display.say(f"{name}: accuracy {result.summary.accuracy}, {result.summary.n} problems")
            return result.summary.to_json() | {"failed_episodes": len(result.errors)}

        return on_main(self._accelerator, play)

    def of_teachers(self) -> dict[str, Any]:
        """Evaluates the teacher, and each other one of its mixture: what ``results.json`` tells of them."""
        config, teachers = self._config, self._parts.teachers
        found = {}
        for number, (name, member) in enumerate(teachers.members.items(), start=1):
            folder = TEACHER if number == 1 else f"{TEACHER}_{number}"
            with member.player(teachers.chat, config.sampling.concurrent_episodes) as engine:
                found[name] = self.evaluate(folder, engine, name)
            if config.teacher.mixture:
                found[name] |= {"weight": config.teacher.mixture[name], "evaluation": folder}
        return {"teacher": found[config.teacher.model]} | ({"teachers": found} if len(found) > 1 else {})

    def during(self, engine: Engine, step: int) -> dict[str, Any]:
        """Evaluates the student between two steps; returns the metrics of it."""
        found = self.evaluate(f"step_{step:08d}", engine, f"{self._config.student.model} after {step} steps")
        return {f"eval/{name}": found[name] for name in ("accuracy", "tool_call_validity")}

    def _play(self, name: str, engine: Engine, model: str) -> EvaluationResult:
        config, parts = self._config, self._parts
        problems = min(config.evaluation.problems, len(parts.eval_task))
        advance = self._display.phase(f"evaluating {name}", problems * config.evaluation.samples)
        chat: ChatFormat = parts.chat
        limits = config.sampling.limits
        if name.partition("_")[0] == TEACHER:
            chat = parts.teachers.chat
            limits = replace(limits, max_tokens=limits.max_tokens + parts.teachers.extra_tokens)
        result = evaluate(
            parts.eval_task,
            engine,
            chat,
            model=model,
            samples=config.evaluation.samples,
            limit=problems,
            tools=config.tools,
            limits=limits,
            sampling=SamplingParams(temperature=config.evaluation.temperature),
            seed=config.run.seed,
            folder=self._folder.path / "evaluations" / name,
            progress=lambda done, total: advance(done, None),
        )
        if name in _WITH_LOG_RATIOS:
            ratios = log_ratios(parts.teachers.scorer, result.trajectories)
            self._folder.write_json(f"evaluations/{name}/log_ratios.json", ratios, indent=None)
        return result
