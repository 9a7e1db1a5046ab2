"""The training loop: the student acts, the teacher scores, the student takes a step; again.

Worked example::

    config = load_config(["configs/demo.yaml", "--run.steps", "20"])
    results = OPDTrainer(config).train()
    results["before"]["accuracy"], results["after"]["accuracy"], results["teacher"]["accuracy"]

One step:

1. roll out: the student plays ``episodes_per_step`` episodes with real tool calls, at temperature 1
2. score: the teacher reads the same tokens
3. update: OPD+ advantages of the sampled tokens (or exact sums over the vocabulary), one AdamW step
4. hand over: the engine gets the new weights
5. write down: metrics, and now and then an evaluation and a checkpoint

With ``rollout_ahead``, step t + 1 is rolled out while step t is scored and updated; see ``step_rollouts``.

Test it alone: ``pytest tests/trainer/run/test_loop.py``
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from accelerate.utils import gather_object
from rich.console import Console

from opd_env.engines.models import LoadedModel
from opd_env.errors import TrainingError
from opd_env.evaluation.read_run import read_metrics
from opd_env.evaluation.result import installed_versions
from opd_env.report.display import Display
from opd_env.report.headline import no_better
from opd_env.report.page import write_report
from opd_env.trainer.batch import PolicyModule
from opd_env.trainer.learn.update import Updater
from opd_env.trainer.run.agreement import facts_of, require_one_folder, require_same
from opd_env.trainer.run.checkpoint import Checkpoints, Progress, restore, state_files
from opd_env.trainer.run.config import OPDConfig
from opd_env.trainer.run.engine import make_engine, require_same_policy, update_engine
from opd_env.trainer.run.folder import RunFolder, git_state
from opd_env.trainer.run.held_out import HeldOut
from opd_env.trainer.run.interruption import Interruption, StoppedAtOnce
from opd_env.trainer.run.learner import Learner, MetricsLog, shown_of
from opd_env.trainer.run.processes import Heartbeat, on_main
from opd_env.trainer.run.rollouts import StepEpisodes, StepProblems, StepRollouts
from opd_env.trainer.run.setup import leave, make_accelerator, make_parts, sandbox_levels, start_trackers
from opd_env.trainer.run.sft import warm_start
from opd_env.trainer.teachers.make import check_teacher


class OPDTrainer:
    """One distillation run. Everything that can be refused is refused before the first step.

    Args:
        config: all settings.
        student, teacher: models that are loaded already; by default those that ``config`` names.
        console: where progress is shown; standard error by default.

    Raises:
        ValueError: the settings, the task, the models or the run folder do not fit; one sentence says why.
    """

    def __init__(
        self,
        config: OPDConfig,
        *,
        student: LoadedModel | None = None,
        teacher: LoadedModel | None = None,
        console: Console | None = None,
    ) -> None:
        self.config = config
        self.accelerator = make_accelerator(config)
        self.heartbeat = Heartbeat(self.accelerator)
        with self.heartbeat:
            self._build(student, teacher, console)

    def _build(self, student: LoadedModel | None, teacher: LoadedModel | None, console: Console | None) -> None:
        config = self.config
        self.folder = RunFolder(config)
        self.parts = parts = make_parts(config, self.accelerator.device, student=student, teacher=teacher)
        require_same(self.accelerator, facts_of(config, parts))
        self.updater = Updater(
            PolicyModule(
                parts.student.model, parts.chat.vocab_size, gradient_checkpointing=config.student.gradient_checkpointing
            ),
            self.accelerator,
            weight_decay=config.optimizer.weight_decay,
            max_grad_norm=config.optimizer.max_grad_norm,
            tokens_per_microbatch=config.optimizer.tokens_per_microbatch,
        )
        self.problems = StepProblems(
            parts.task,
            per_step=config.sampling.problems_per_step,
            samples=config.sampling.samples_per_problem,
            seed=config.run.seed,
        )
        self.learner = Learner(config, parts, self.updater, self.problems)
        self.engine = make_engine(config, parts.student, parts.chat, self.folder.path / "engine_weights")
        self.rollouts = StepRollouts(
            config, parts, self.engine, self.problems, self.updater, self.folder.path / "trajectories"
        )
        self.checkpoints = Checkpoints(self.folder.path / "checkpoints", keep=config.run.checkpoint_keep)
        self.display = Display(console, enabled=self._is_main)
        self.held_out = HeldOut(config, parts, self.folder, self.accelerator, self.display)
        self.step = 0
        """Steps that are done."""
        self.results: dict[str, Any] = {}
        """What ``results.json`` holds."""
        self._whole, self._aligned, self._gap_warned = True, False, False

    def train(self) -> dict[str, Any]:
        """Runs to the end, or continues a run that was stopped; returns what ``results.json`` holds.

        Raises:
            KeyboardInterrupt: Ctrl-C; a checkpoint has been written and the same command continues.
            TrainingError: the loss or the gradient is not finite, or a rollout failed as a whole.
            CheckpointError: a checkpoint cannot be written; earlier ones are kept.
        """
        run = self.config.run
        with self._open() as interruption:
            self._begin_or_continue()
            advance = self.display.phase("training", run.steps, self.step)
            with self._stopping_whole():
                while self.step < run.steps:
                    self._evaluate_if_due()
                    began = time.perf_counter()
                    played = self._roll_out()  # 1. the student acts
                    with interruption.postponed():
                        with self._one_piece():
                            with self.rollouts.ahead(self.step + 1):
                                metrics = self._learn(self.step, played)  # 2. teacher scores; 3. student updates
                            metrics |= self._times(metrics, time.perf_counter() - began)
                            self._update_engine()  # 4. the engine samples with the new weights from now on
                            self.step += 1
                        self._log(metrics)  # 5. what happened is written down
                        if self.step == run.steps or _due(run.checkpoint_every, self.step):
                            self._save(self.step)
                    advance(self.step, shown_of(metrics))
                name = f"{self.config.student.model} after {self.step} steps"
                self.results["after"] = self.held_out.evaluate("after", self.engine, name)
            return self._finish()

    @contextmanager
    def _open(self) -> Iterator[Interruption]:
        """Holds everything that a run holds, and lets it go in the right order."""
        agree = self._any_process if self.accelerator.num_processes > 1 else None
        with (
            Interruption(agree, lambda: self.heartbeat.ended) as interruption,
            self.heartbeat, self.display, self._left(), closing(self.parts.teachers), closing(self.engine),
        ):  # fmt: skip
            on_main(self.accelerator, self.folder.open)
            require_one_folder(self.accelerator, self.folder.path)
            start_trackers(self.accelerator, self.config)
            yield interruption

    def _begin_or_continue(self) -> None:
        """Restores the newest checkpoint; without one, evaluates the models and takes the supervised steps."""
        self.results = self.folder.read_results()
        progress = self._continue()
        self._started = time.perf_counter() - (0.0 if progress is None else progress.seconds)
        self._update_engine()
        require_same_policy(self.engine, self.parts.student, self.parts.chat, self.accelerator)
        if progress is None:
            self.results = self._evaluate_before()
            warm_start(self.config, self.parts, self.updater, self.display)
            self._update_engine()
        else:
            self.step = progress.step
        log_file, step = self.folder.path / "metrics.jsonl", self.step
        # A run that was killed after an evaluation has its numbers already.
        self._evaluated = any(row["step"] == step and "eval/accuracy" in row for row in read_metrics(log_file))
        self._metrics = MetricsLog(log_file, last_step=step) if self._is_main else None

    @contextmanager
    def _stopping_whole(self) -> Iterator[None]:
        """On Ctrl-C, saves what is whole and tells how to continue."""
        try:
            yield
        except StoppedAtOnce:
            if not self.heartbeat.ended:
                self.display.warn(
                    f"stopped at once, by a second signal. {self._last_checkpoint()}; start the same command again to "
                    "continue"
                )
            raise
        except KeyboardInterrupt:
            if self._whole and self.step > 0 and self.step not in self.checkpoints.steps():
                self._save(self.step)
            self.display.say(f"stopped after step {self.step}; start the same command again to continue")
            raise

    @contextmanager
    def _one_piece(self) -> Iterator[None]:
        """Around what may not be saved half done; a step that fails in it is not a step."""
        self._whole = False
        yield
        self._whole = True

    def _roll_out(self) -> StepEpisodes:
        played = self.rollouts.take(self.step)
        for error in played.errors[:1]:
            self.display.warn(f"step {self.step + 1}: {len(played.errors)} episodes failed; the first: {error.message}")
        if not self._aligned:
            untrained = self.step == 0 and not self.config.run.sft_steps
            check_teacher(self.parts.teachers, played.trajectories, self.config.student.model if untrained else None)
            self._aligned = True
        return played

    def _evaluate_if_due(self) -> None:
        if self.step and _due(self.config.evaluation.every, self.step) and not self._evaluated:
            self._log(self.held_out.during(self.engine, self.step))
        self._evaluated = False

    @contextmanager
    def _left(self) -> Iterator[None]:
        """Leaves the group of processes last: a vLLM of this process uses it until it is closed."""
        try:
            yield
        except StoppedAtOnce:
            raise
        except KeyboardInterrupt:
            self._leave()
            raise
        self._leave()

    def _leave(self) -> None:
        self.heartbeat.stop()
        leave(self.accelerator)

    def _update_engine(self) -> None:
        update_engine(self.engine, self.parts.student.model, self.accelerator)

    def _learn(self, step: int, played: StepEpisodes) -> dict[str, Any]:
        try:
            metrics = self.learner.learn(step, played)
        except TrainingError as error:
            raise TrainingError(f"{error}. {self._last_checkpoint()}") from error
        self._warn_of_gap(step + 1, metrics.get("train/logprob_gap", 0.0))
        return metrics

    def _times(self, metrics: Mapping[str, Any], seconds: float) -> dict[str, float]:
        """What a step of so many seconds took, as metrics; of a rollout ahead, a step takes what it waited for it."""
        ahead = {"time/rollout_s": self.rollouts.waited_seconds, "time/rollout_ahead_s": metrics["time/rollout_s"]}
        return {
            **(ahead if self.config.sampling.rollout_ahead else {}),
            "time/step_s": seconds,
            "tokens_per_s": metrics["rollout/sampled_tokens"] / seconds,
        }

    def _evaluate_before(self) -> dict[str, Any]:
        """Evaluates student and teacher before any step; returns ``results.json`` as it then is."""
        config = self.config
        results: dict[str, Any] = {
            "before": self.held_out.evaluate("before", self.engine, config.student.model),
            **self.held_out.of_teachers(),
            "seed": config.run.seed,
            "config_hash": config.config_hash,
            "versions": installed_versions(),
            **sandbox_levels(config, self.parts.task),
            **git_state(),
        }
        on_main(self.accelerator, lambda: self.folder.write_json("results.json", results))
        teacher, student = results["teacher"]["accuracy"], results["before"]["accuracy"]
        known = "teachers" not in results and None not in (teacher, student)
        if self._is_main and known and teacher <= student:
            self.display.warn(f"the {no_better(teacher, student)}")
        return results

    def _continue(self) -> Progress | None:
        """Restores the newest checkpoint, if the run has one; forgets what was played after it."""
        checkpoint = self.checkpoints.newest()
        progress = None if checkpoint is None else restore(self.updater, checkpoint)
        on_main(self.accelerator, lambda: self.folder.forget_episodes(0 if progress is None else progress.step))
        if progress is not None and checkpoint is not None:
            self.rollouts.restore(checkpoint)
            self.display.say(f"continuing after step {progress.step}, from {checkpoint.folder}")
        return progress

    def _save(self, step: int) -> None:
        seconds = time.perf_counter() - self._started
        files = state_files(self.updater, Progress(self.config.config_hash, step, self.updater.updates, seconds))
        files |= self.rollouts.files(step)
        on_main(self.accelerator, lambda: self.checkpoints.save(step, files))

    def _log(self, metrics: Mapping[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write({"step": self.step, **metrics})
        self.accelerator.log(dict(metrics), step=self.step)

    def _finish(self) -> dict[str, Any]:
        self.results |= {"steps": self.config.run.steps, "seconds": time.perf_counter() - self._started}

        def write() -> None:
            self.folder.write_json("results.json", self.results)
            self.folder.save_model(self.parts.save_student)
            write_report(self.folder.path)
            self.display.say(f"done: {self.parts.student.name}, results in {self.folder.path}")

        # All together: a process that leaves its group while another still works can wait for it forever.
        on_main(self.accelerator, write)
        return self.results

    def _warn_of_gap(self, step: int, gap: float) -> None:
        if gap > self.config.sampling.max_logprob_gap and not self._gap_warned:
            self._gap_warned = True
            self.display.warn(
                f"step {step}: sampler and trainer disagree by {gap:.3g} nats per token on average "
                f"(above sampling.max_logprob_gap={self.config.sampling.max_logprob_gap}): the update is then "
                "off-policy; look at student.dtype"
            )

    def _last_checkpoint(self) -> str:
        steps = self.checkpoints.steps()
        return f"The checkpoint of step {steps[-1]} is kept" if steps else "There is no checkpoint yet"

    def _any_process(self, stop: bool) -> bool:
        return any(gather_object([stop]))

    @property
    def _is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)


def _due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps, 0 for never, happens after this one."""
    return every > 0 and step % every == 0
