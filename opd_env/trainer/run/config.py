"""Every setting of a distillation run, typed, documented and checked before anything is loaded.

Worked example::

    config = OPDConfig(student="packaged:student", teacher="packaged:teacher", task="arithmetic", steps=20)
    config = load_config(["configs/demo.yaml", "--divergence", "jsd", "--limits.max_turns", "4"])

Settings that cannot give a right run are refused here with the reason; ``opd_env.settings.fields`` reads them.

Test it alone: ``pytest tests/trainer/run/test_config.py``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from opd_env.episode.limits import RolloutLimits
from opd_env.settings.fields import ConfigError, check_range, choose, fingerprint
from opd_env.settings.read import configure
from opd_env.trainer.learn.token_weights import Scheme, TokenWeights
from opd_env.trainer.math.modes import Baseline, Estimator, Mode, RatioPolicy
from opd_env.trainer.run.contradictions import refuse_contradictions

UNHASHED = ("output", "resume", "trackers", "checkpoint_every", "checkpoint_keep", "ray_address", "teacher_offload")
"""Settings that change where and how often things are written, but no number: not in ``config_hash``."""


class TeacherEngine(StrEnum):
    """What runs teachers that are models rather than URLs."""

    LOCAL = "local"
    """Transformers."""
    VLLM = "vllm"
    """vLLM in this process."""


class Schedule(StrEnum):
    """Learning rate after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    """Straight down to 0 at the last step."""
    COSINE = "cosine"
    """Half a cosine down to 0 at the last step."""


class Precision(StrEnum):
    """Number format of the weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Resume(StrEnum):
    """What to do with a run that is already in the output folder."""

    AUTO = "auto"
    """Continue it from its newest sound checkpoint."""
    NEVER = "never"
    """Remove it and start anew."""


@dataclass(frozen=True)
class LoRASettings:
    """Train low-rank adapters (peft) instead of all weights."""

    rank: int = 16
    """Rank of the adapters, 1 to 1024."""
    alpha: float = 32.0
    """Scale: the adapter's output is multiplied by alpha / rank; above 0."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get an adapter; all-linear means every linear layer but the head."""

    def __post_init__(self) -> None:
        check_range(self, "rank", 1, 1024, prefix="lora.")
        check_range(self, "alpha", 0, exclusive=True, prefix="lora.")
        if not self.targets:
            raise ConfigError("lora.targets is empty; name layers, or all-linear")


@dataclass(frozen=True)
class OPDConfig:
    """Settings of one on-policy distillation run.

    Raises:
        ConfigError: a value out of range, or settings that cannot give a right run together.
    """

    student: str
    """The model to train: packaged:student, a folder, a hub id, or smollm2."""
    teacher: str
    """The model that scores the student's tokens, or the URLs of vLLM servers that serve it, as a,b.
    The student's own name means its initial weights."""
    task: str
    """Registered name of the task to train and evaluate on."""
    task_options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task, such as a data file or difficulty levels."""
    split: str = "train"
    """Split to train on; the task must allow training on it."""
    tools: tuple[str, ...] | None = None
    """Names of the tools offered to the student; null takes the task's own."""
    imports: tuple[str, ...] = ()
    """Python files to run first, so that their @tool, @register_task and register_divergence take effect."""
    chat_format: str | None = None
    """Name of the chat format; null finds it from the tokenizer's template."""
    repair_calls: bool = False
    """Put small faults of calls right when they are read, and count each; scores then hold calls that were faulty."""
    mcp_servers: Mapping[str, Any] = field(default_factory=dict)
    """MCP servers whose tools can be named in ``tools``: by a name of your choice, the options of ``mount_mcp``, such
    as ``{shop: {server: [python, shop.py]}}``."""
    ray_address: str | None = None
    """A Ray cluster to run the processes of tools in, such as auto or host:port; null runs them on this machine."""
    teacher_demonstrations: int = 0
    """Worked examples of the task put into the teacher's prompt only, 0 to 64 (self-distillation)."""
    teacher_sees_answer: bool = False
    """The gold answer stands at the end of the question in the teacher's prompt only (self-distillation)."""
    teacher_routes: Mapping[str, str] = field(default_factory=dict)
    """Other teachers (models or servers) by the name of a tool that a problem offers, or of its task. Not for
    estimator=full."""
    teacher_mixture: Mapping[str, float] = field(default_factory=dict)
    """Teachers (models or servers, ``teacher`` among them) that are one by the weighted mean of their distributions:
    weights above 0 with a sum of 1. Empty: ``teacher`` alone."""
    teacher_engine: TeacherEngine = TeacherEngine.LOCAL
    """What runs teachers that are models: local (transformers), or vllm (in this process; not for estimator=full)."""
    teacher_offload: bool = False
    """Keep teachers in CPU memory while they do not score, one of several on the accelerator at a time."""
    cross_tokenizer: bool = False
    """The teacher has another tokenizer: compare on spans of text that both cut alike (sampled estimator)."""
    teacher_cache: str | None = None
    """Folder in which the teacher's log-probs are kept and found again; null keeps none. Not for estimator=full."""

    divergence: str = "reverse_kl"
    """Name of the f-divergence between teacher and student."""
    divergence_options: Mapping[str, float] = field(default_factory=dict)
    """Parameters of the divergence, such as alpha or beta."""
    mode: Mode = Mode.OPD_PLUS_CENTRED
    """The advantage: the paper's corrected one, its centred form, or the biased stop-gradient one."""
    estimator: Estimator = Estimator.FULL
    """full sums over the vocabulary, topk over the teacher's top k; sampled uses one teacher log-prob per token."""
    topk_tokens: int = 32
    """The teacher's most likely tokens that estimator=topk sums over, 1 or more; the rest is one bucket."""
    baseline: Baseline = Baseline.NONE
    """value subtracts E_p[w_f(u)] from a token's weight: less noise (sampled estimator, not mode=opd)."""
    gamma: float = 0.0
    """Discount of later tokens' divergence in a token's advantage, 0 to 1 (sampled estimator)."""
    ratio_policy: RatioPolicy = RatioPolicy.ROLLOUT
    """The student that the teacher is compared with where the one that sampled is older: updates_per_step above 1, or
    rollout_ahead (sampled estimator)."""
    clip_log_ratio: float | None = None
    """Bound on |log u| in nats, above 0; null does not clip."""
    clip_ratio: float | None = None
    """PPO clip of the importance ratio to 1 ± this, 0 to 1; null does not clip (sampled estimator)."""
    truncate_weight: float | None = None
    """Upper bound on the importance ratio, at least 1; null does not bound (sampled estimator)."""
    divergence_coefficient: float = 1.0
    """Factor of the distillation signal, 0 or more; 0 learns from the reward alone."""
    weights: TokenWeights = field(default_factory=TokenWeights)
    """How much each token counts in the distillation signal: by kind, turn, place or failed calls."""
    weight_scheme: Scheme = Scheme.NONE
    """Further weights as a paper proposes them: sod (by turn drift), turn_opd (equal turns), iw_opd (early tokens)."""
    reward_coefficient: float = 0.0
    """Factor of the task reward (1 for a solved problem), relative to a problem's other samples; 0 or more."""

    steps: int = 100
    """Rollout-and-update rounds, 1 or more."""
    episodes_per_step: int = 64
    """Episodes sampled per step over all processes, 1 or more."""
    samples_per_problem: int = 1
    """Episodes of the same problem within a step, 1 or more; must divide episodes_per_step."""
    updates_per_step: int = 1
    """Optimiser updates per step, each on its own share of the problems; 1 or more."""
    tokens_per_microbatch: int = 8192
    """Padded tokens in one forward and backward pass, 1 or more; memory and padding, not results, depend on it. Of a
    longer row, or of rows of an episode that must be seen together, there is one at a time."""
    gradient_checkpointing: bool = False
    """Compute every layer again in the backward pass instead of keeping it: less memory, a third more work."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW, above 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay, 0 or more."""
    warmup_steps: int = 0
    """Optimiser updates over which the learning rate rises from 0; 0 or more."""
    schedule: Schedule = Schedule.CONSTANT
    """Learning rate after the warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, above 0."""
    lora: LoRASettings | None = None
    """Train low-rank adapters instead of all weights; null trains all weights."""
    sft_steps: int = 0
    """Supervised steps on expert episodes before distillation, 0 or more."""
    sft_learning_rate: float = 1e-3
    """Learning rate of these steps, above 0."""
    dtype: Precision = Precision.FLOAT32
    """Number format of the student's weights."""
    teacher_dtype: Precision = Precision.FLOAT32
    """Number format of the teacher's weights."""
    seed: int = 0
    """Seed of sampling, problem order and initial adapters, 0 or more."""

    temperature: float = 1.0
    """Sampling temperature of rollouts, above 0 up to 2; student and teacher are scored at the same one."""
    top_p: float = 1.0
    """Must be 1: on-policy distillation needs samples from the full distribution."""
    top_k: int = 0
    """Must be 0 (off), for the same reason."""
    limits: RolloutLimits = field(default_factory=RolloutLimits)
    """Budgets of an episode."""
    engine: str = "local"
    """What samples the episodes: local (transformers), vllm (in this process), or URLs of vLLM servers, as a,b."""
    vllm_options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of every vllm.LLM in this process, such as ``{gpu_memory_utilization: 0.3}``."""
    concurrent_episodes: int = 64
    """Episodes that the engine plays side by side, 1 or more; memory grows with it."""
    tool_workers: int = 0
    """Threads that run tools; 0 runs them in turn, so that a run can be repeated to the bit."""
    rollout_ahead: bool = False
    """Sample the next step's episodes with the weights of now, while this step's are learnt from: a step off-policy."""
    max_logprob_gap: float = 0.05
    """Warn when sampler and trainer log-probs of a token differ by more on average; nats, above 0."""

    eval_every: int = 0
    """Steps between evaluations; 0 evaluates only before and after training."""
    eval_problems: int = 200
    """Problems per evaluation, the first of the split; 1 or more."""
    eval_split: str = "test"
    """Split to evaluate on; never the one trained on."""
    eval_samples: int = 1
    """Episodes per problem in an evaluation, 1 or more."""
    eval_temperature: float = 0.0
    """Sampling temperature of evaluations, 0 (greedy) to 2."""
    checkpoint_every: int = 25
    """Steps between checkpoints; 0 writes one at the end only."""
    checkpoint_keep: int = 2
    """Checkpoints kept, the newest; 1 or more."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, trackio, mlflow."""
    output: str = "runs/opd"
    """Run folder."""
    resume: Resume = Resume.AUTO
    """auto continues the run in the output folder; never removes it and starts anew."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("mode", Mode), ("estimator", Estimator), ("baseline", Baseline), ("ratio_policy", RatioPolicy),
            ("weight_scheme", Scheme), ("schedule", Schedule), ("dtype", Precision), ("teacher_dtype", Precision),
            ("resume", Resume), ("teacher_engine", TeacherEngine),
        ):  # fmt: skip
            object.__setattr__(self, name, choose(name, getattr(self, name), choices))
        for name in ("student", "teacher", "task", "split", "eval_split", "divergence", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; set it")
        for name in (
            "steps", "episodes_per_step", "samples_per_problem", "updates_per_step", "tokens_per_microbatch",
            "concurrent_episodes", "eval_problems", "eval_samples", "checkpoint_keep", "topk_tokens",
        ):  # fmt: skip
            check_range(self, name, 1)
        for name in (
            "weight_decay", "warmup_steps", "sft_steps", "seed", "tool_workers", "eval_every", "checkpoint_every",
            "divergence_coefficient", "reward_coefficient",
        ):  # fmt: skip
            check_range(self, name, 0)
        for name in ("learning_rate", "sft_learning_rate", "max_grad_norm", "max_logprob_gap"):
            check_range(self, name, 0, exclusive=True)
        if self.clip_log_ratio is not None:
            check_range(self, "clip_log_ratio", 0, exclusive=True)
        if self.clip_ratio is not None:
            check_range(self, "clip_ratio", 0, 0.999, exclusive=True)
        if self.truncate_weight is not None:
            check_range(self, "truncate_weight", 1)
        check_range(self, "gamma", 0, 1)
        check_range(self, "teacher_demonstrations", 0, 64)
        check_range(self, "temperature", 0, 2, exclusive=True)
        check_range(self, "eval_temperature", 0, 2)
        refuse_contradictions(self)

    @property
    def needs_distributions(self) -> bool:
        """Whether the teacher's log-prob of the sampled token alone is not enough."""
        return self.estimator is not Estimator.SAMPLED or self.baseline is Baseline.VALUE

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
