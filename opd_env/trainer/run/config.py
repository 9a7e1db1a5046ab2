"""Every setting of a distillation run, typed, documented and checked before anything is loaded.

Worked example::

    config = load_config(["configs/demo.yaml", "--objective.divergence", "jsd", "--sampling.limits.max_turns", "4"])
    config.objective.divergence, config.run.steps

Settings stand in groups, each checked beside its fields (``trainer.teachers.settings``, ``trainer.learn.settings``,
and below); what no group can decide alone is refused at the end of this file, with the reason.

Test it alone: ``pytest tests/trainer/run/test_config.py``
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from opd_env.episode.settings import ModelFields, Precision, SamplingFields, TaskFields
from opd_env.settings.fields import ConfigError, Settings, fingerprint, number
from opd_env.settings.read import configure
from opd_env.trainer.learn.settings import ObjectiveSettings, OptimizerSettings
from opd_env.trainer.math.modes import Estimator, RatioPolicy
from opd_env.trainer.teachers.settings import TeacherEngine, TeacherSettings

UNHASHED = (
    "run.output", "run.resume", "run.trackers", "run.checkpoint_every", "run.checkpoint_keep", "ray_address",
    "teacher.offload",
)  # fmt: skip
"""Settings that change where and how often things are written, but no number: not in ``config_hash``."""

_OFF_POLICY = (
    "it would make the rollouts off-policy (OPD needs samples from the full distribution), so it is no setting; leave "
    "it out"
)


class Resume(StrEnum):
    """What to do with a run that is already in the output folder."""

    AUTO = "auto"
    """Continue it from its newest sound checkpoint."""
    NEVER = "never"
    """Remove it and start anew."""


@dataclass(frozen=True, kw_only=True)
class LoRASettings(Settings):
    """Train low-rank adapters (peft) instead of all weights."""

    path = "student.lora"
    rank: int = number(16, low=1, high=1024)
    """Rank of the adapters, 1 to 1024."""
    alpha: float = number(32.0, above=0)
    """Scale: the adapter's output is multiplied by alpha / rank; above 0."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get an adapter; all-linear means every linear layer but the head."""

    def check(self) -> None:
        """Refuses adapters of nothing."""
        if not self.targets:
            raise ConfigError("student.lora.targets is empty; name layers, or all-linear")


@dataclass(frozen=True, kw_only=True)
class StudentSettings(ModelFields):
    """The model to train."""

    path = "student"
    lora: LoRASettings | None = None
    """Train low-rank adapters instead of all weights; null trains all weights."""
    gradient_checkpointing: bool = False
    """Compute every layer again in the backward pass instead of keeping it: less memory, a third more work."""

    def check(self) -> None:
        """Refuses weights in which small gradients become 0."""
        super().check()
        if self.dtype is Precision.FLOAT16:
            raise ConfigError("student.dtype=float16 loses small gradients; set bfloat16 or float32 to train")


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(SamplingFields):
    """How the student's episodes are played."""

    path = "sampling"
    episodes_per_step: int = number(64, low=1)
    """Episodes sampled per step over all processes, 1 or more."""
    samples_per_problem: int = number(1, low=1)
    """Episodes of the same problem within a step, 1 or more; must divide episodes_per_step."""
    temperature: float = number(1.0, above=0, high=2)
    """Sampling temperature of rollouts, above 0 up to 2; student and teacher are scored at the same one."""
    tool_workers: int = number(0, low=0)
    """Threads that run tools; 0 runs them in turn, so that a run can be repeated to the bit."""
    rollout_ahead: bool = False
    """Sample the next step's episodes with the weights of now, while this step's are learnt from: a step off-policy."""
    max_logprob_gap: float = number(0.05, above=0)
    """Warn when sampler and trainer log-probs of a token differ by more on average; nats, above 0."""

    def check(self) -> None:
        """Refuses samples that do not divide the step."""
        super().check()
        if self.episodes_per_step % self.samples_per_problem:
            raise ConfigError(
                f"sampling.episodes_per_step={self.episodes_per_step} is not a multiple of "
                f"sampling.samples_per_problem={self.samples_per_problem}; change one"
            )

    @property
    def problems_per_step(self) -> int:
        """Problems that a step plays, each ``samples_per_problem`` times."""
        return self.episodes_per_step // self.samples_per_problem


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Settings):
    """How the student is scored on problems that it does not train on."""

    path = "evaluation"
    every: int = number(0, low=0)
    """Steps between evaluations; 0 evaluates only before and after training."""
    problems: int = number(200, low=1)
    """Problems per evaluation, the first of the split; 1 or more."""
    split: str = "test"
    """Split to evaluate on; never the one trained on."""
    samples: int = number(1, low=1)
    """Episodes per problem in an evaluation, 1 or more."""
    temperature: float = number(0.0, low=0, high=2)
    """Sampling temperature of evaluations, 0 (greedy) to 2."""

    def check(self) -> None:
        """Refuses samples that would all be the same."""
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(
                f"evaluation.samples={self.samples} of greedy decoding would all be the same; set "
                "evaluation.temperature, or evaluation.samples=1"
            )


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """How long a run is, and what it writes."""

    path = "run"
    steps: int = number(100, low=1)
    """Rollout-and-update rounds, 1 or more."""
    sft_steps: int = number(0, low=0)
    """Supervised steps on expert episodes before distillation, 0 or more."""
    seed: int = number(0, low=0)
    """Seed of sampling, problem order and initial adapters, 0 or more."""
    checkpoint_every: int = number(25, low=0)
    """Steps between checkpoints; 0 writes one at the end only."""
    checkpoint_keep: int = number(2, low=1)
    """Checkpoints kept, the newest; 1 or more."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, trackio, mlflow."""
    output: str = "runs/opd"
    """Run folder."""
    resume: Resume = Resume.AUTO
    """auto continues the run in the output folder; never removes it and starts anew."""


@dataclass(frozen=True, kw_only=True)
class OPDConfig(TaskFields):
    """Settings of one on-policy distillation run.

    Raises:
        ConfigError: a value out of range, or settings that cannot give a right run together.
    """

    common = (
        "student.model", "teacher.model", "task", "task_options", "objective.divergence", "optimizer.learning_rate",
        "sampling.episodes_per_step", "run.steps", "run.seed", "run.output",
    )  # fmt: skip
    refused = {"top_p": _OFF_POLICY, "top_k": _OFF_POLICY}

    task: str
    """Registered name of the task to train and evaluate on."""
    split: str = "train"
    """Split to train on; the task must allow training on it."""
    student: StudentSettings
    """The model to train."""
    teacher: TeacherSettings
    """Who scores the student's tokens."""
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    """What the student's tokens are rewarded for."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How episodes are played."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """How the student takes its steps."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """How the student is scored."""
    run: RunSettings = field(default_factory=RunSettings)
    """How long the run is, and what it writes."""

    def check(self) -> None:
        """Refuses what no group can decide alone."""
        for reason in _contradictions(self):
            raise ConfigError(reason)

    @property
    def config_hash(self) -> str:
        """Equal for runs that must give the same numbers."""
        return fingerprint(self, without=UNHASHED)


def load_config(arguments: Sequence[str], *, prog: str = "opd-env train") -> OPDConfig:
    """The configuration that YAML files and ``--key value`` options give, later ones winning.

    Raises:
        ConfigError: one sentence on what is wrong and what to write instead.
    """
    return configure(OPDConfig, arguments, prog=prog)


def _contradictions(config: OPDConfig) -> Iterator[str]:
    """Groups that are fine alone and cannot give a right run together: what contradicts what, and what to set."""
    yield from _counts(config)
    yield from _teachers(config)
    yield from _ahead(config)
    yield from _servers(config)


def _counts(config: OPDConfig) -> Iterator[str]:
    run, sampling, optimizer = config.run, config.sampling, config.optimizer
    if config.evaluation.split == config.split:
        yield f"evaluation.split and split are both {config.split!r}; evaluate on a split that is not trained on"
    if optimizer.updates_per_step > sampling.problems_per_step:
        yield (
            f"optimizer.updates_per_step={optimizer.updates_per_step} is more than the {sampling.problems_per_step} "
            "problems of a step; every update needs one"
        )
    updates = run.steps * optimizer.updates_per_step
    if optimizer.warmup_steps > updates:
        yield f"optimizer.warmup_steps={optimizer.warmup_steps} is more than the run's {updates} updates; lower it"
    if config.objective.reward_coefficient > 0 and sampling.samples_per_problem == 1:
        yield (
            f"objective.reward_coefficient={config.objective.reward_coefficient} compares a problem's samples with "
            "each other, and sampling.samples_per_problem=1 leaves nothing to compare; set it to 4 or more"
        )


def _teachers(config: OPDConfig) -> Iterator[str]:
    """What the teacher must give for the objective, and cannot."""
    teacher, objective = config.teacher, config.objective
    if objective.estimator is Estimator.FULL and (teacher.routes or teacher.cache):
        name = "routes" if teacher.routes else "cache"
        yield (
            f"teacher.{name} is for log-probs, and objective.estimator=full takes one teacher's logits of every token; "
            "set objective.estimator=topk or sampled"
        )
    if teacher.cross_tokenizer and objective.estimator is not Estimator.SAMPLED:
        yield (
            f"teacher.cross_tokenizer compares spans of text, and objective.estimator={objective.estimator} needs one "
            "vocabulary; set objective.estimator=sampled"
        )
    plain = ObjectiveSettings()
    for name in ("baseline", "gamma", "weight_scheme") if teacher.cross_tokenizer else ():
        if getattr(objective, name) != getattr(plain, name):
            yield (
                f"objective.{name}={getattr(objective, name)} does not work with teacher.cross_tokenizer, which judges "
                f"spans of text; leave objective.{name} out"
            )
    if teacher.mixture and objective.needs_distributions and teacher.outside:
        option = "baseline=value" if objective.estimator is Estimator.SAMPLED else f"estimator={objective.estimator}"
        yield (
            f"objective.{option} needs the whole distribution of the teacher.mixture, and vLLM gives few tokens of "
            "each member; set objective.estimator=sampled and objective.baseline=none, or teacher.engine=local and "
            "models instead of URLs"
        )
    if teacher.outside and objective.estimator is Estimator.FULL:
        yield (
            "objective.estimator=full needs the teacher's logits, and vLLM gives log-probs of few tokens; set "
            "objective.estimator=sampled, or topk with objective.topk_tokens up to a server's --max-logprobs (20 by "
            "default)"
        )


def _ahead(config: OPDConfig) -> Iterator[str]:
    """What an importance ratio per token does not correct."""
    if not config.sampling.rollout_ahead:
        return
    objective = config.objective
    if objective.estimator is Estimator.SAMPLED and objective.ratio_policy is not RatioPolicy.CURRENT:
        yield (
            "sampling.rollout_ahead samples with the student of one step before, and objective.ratio_policy=rollout "
            "would compare the teacher with that one, which biases the update; set objective.ratio_policy=current"
        )
    if objective.gamma > 0:
        yield (
            f"objective.gamma={objective.gamma} counts the divergence of later tokens, which with "
            "sampling.rollout_ahead an older student chose, and no ratio of a token corrects that; set "
            "objective.gamma=0, or leave sampling.rollout_ahead out"
        )
    if config.teacher.cross_tokenizer:
        yield (
            "teacher.cross_tokenizer compares spans of tokens, and the ratio of a token does not correct that an older "
            "student chose the others; leave sampling.rollout_ahead or teacher.cross_tokenizer out"
        )
    if config.sampling.engine == config.teacher.engine == TeacherEngine.VLLM:
        yield (
            "sampling.rollout_ahead with sampling.engine=vllm and teacher.engine=vllm would run two vLLM at once in "
            "one process, which share state; put one of them behind a server, or leave sampling.rollout_ahead out"
        )


def _servers(config: OPDConfig) -> Iterator[str]:
    """vLLM reports log-probs at temperature 1 only."""
    sampling, evaluation = config.sampling, config.evaluation
    if sampling.engine == "local" and not config.teacher.outside:
        return
    if sampling.temperature != 1.0:
        yield (
            f"sampling.temperature={sampling.temperature}: vLLM reports log-probs at temperature 1 only; set 1, or "
            "sampling.engine=local and a local teacher"
        )
    if evaluation.temperature not in (0.0, 1.0):
        yield (
            f"evaluation.temperature={evaluation.temperature} with sampling.engine={sampling.engine}, "
            f"teacher.model={config.teacher.model}: vLLM reports log-probs at temperature 1 only; set 0 or 1"
        )
