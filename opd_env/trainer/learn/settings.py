"""Settings of what is learnt and how: the groups ``objective`` and ``optimizer``.

Test it alone: ``pytest tests/trainer/run/test_config.py``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from opd_env.settings.fields import ConfigError, Settings, number
from opd_env.trainer.learn.token_weights import Scheme, TokenWeights
from opd_env.trainer.math.modes import Baseline, Estimator, Mode, RatioPolicy


class Schedule(StrEnum):
    """Learning rate after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    """Straight down to 0 at the last step."""
    COSINE = "cosine"
    """Half a cosine down to 0 at the last step."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(Settings):
    """What the student's tokens are rewarded for."""

    path = "objective"
    divergence: str = "reverse_kl"
    """Name of the f-divergence between teacher and student."""
    divergence_options: Mapping[str, float] = field(default_factory=dict)
    """Parameters of the divergence, such as alpha or beta."""
    mode: Mode = Mode.OPD_PLUS_CENTRED
    """The advantage: the paper's corrected one, its centred form, or the biased stop-gradient one."""
    estimator: Estimator = Estimator.FULL
    """full sums over the vocabulary, topk over the teacher's top k; sampled uses one teacher log-prob per token."""
    topk_tokens: int = number(32, low=1)
    """The teacher's most likely tokens that estimator=topk sums over; the rest is one bucket."""
    baseline: Baseline = Baseline.NONE
    """value subtracts E_p[w_f(u)] from a token's weight: less noise (sampled estimator, not mode=opd)."""
    gamma: float = number(0.0, low=0, high=1)
    """Discount of later tokens' divergence in a token's advantage, 0 to 1 (sampled estimator)."""
    ratio_policy: RatioPolicy = RatioPolicy.ROLLOUT
    """The student that the teacher is compared with where the one that sampled is older: updates_per_step above 1, or
    rollout_ahead (sampled estimator)."""
    clip_log_ratio: float | None = number(None, above=0)
    """Bound on |log u| in nats, above 0; null does not clip."""
    clip_ratio: float | None = number(None, above=0, high=0.999)
    """PPO clip of the importance ratio to 1 ± this, 0 to 1; null does not clip (sampled estimator)."""
    truncate_weight: float | None = number(None, low=1)
    """Upper bound on the importance ratio, at least 1; null does not bound (sampled estimator)."""
    divergence_coefficient: float = number(1.0, low=0)
    """Factor of the distillation signal, 0 or more; 0 learns from the reward alone."""
    token_weights: TokenWeights = field(default_factory=TokenWeights)
    """How much each token counts in the distillation signal: by kind, turn, place or failed calls."""
    weight_scheme: Scheme = Scheme.NONE
    """Further weights as a paper proposes them: sod (by turn drift), turn_opd (equal turns), iw_opd (early tokens)."""
    reward_coefficient: float = number(0.0, low=0)
    """Factor of the task reward (1 for a solved problem), relative to a problem's other samples; 0 or more."""

    @property
    def needs_distributions(self) -> bool:
        """Whether the teacher's log-prob of the sampled token alone is not enough."""
        return self.estimator is not Estimator.SAMPLED or self.baseline is Baseline.VALUE

    def check(self) -> None:
        """Refuses options that contradict each other or have no meaning together."""
        if self.divergence_coefficient == self.reward_coefficient == 0:
            raise ConfigError(
                "objective.divergence_coefficient and objective.reward_coefficient are both 0: nothing would be "
                "learnt; set one"
            )
        if self.clip_ratio is not None and self.truncate_weight is not None:
            raise ConfigError(
                "objective.clip_ratio and objective.truncate_weight bound the same importance ratio; set one of them"
            )
        if self.baseline is Baseline.VALUE and self.mode is Mode.OPD:
            raise ConfigError(
                "objective.baseline=value is the mean of the OPD+ weight and has no meaning with objective.mode=opd; "
                "set objective.mode=opd_plus"
            )
        if self.estimator is Estimator.SAMPLED:
            self._require_free_constant()
            return
        for name, off in (("gamma", 0.0), ("baseline", Baseline.NONE), ("clip_ratio", None), ("truncate_weight", None)):
            if getattr(self, name) != off:
                raise ConfigError(
                    f"objective.{name}={getattr(self, name)} has no meaning with objective.estimator={self.estimator}, "
                    "which sums over what could have been sampled at each token; set objective.estimator=sampled, or "
                    f"leave objective.{name} out"
                )

    def _require_free_constant(self) -> None:
        """A constant in the advantage is free only where weights do not look at the sampled token or beyond it."""
        centred = self.mode is not Mode.OPD_PLUS or self.baseline is Baseline.VALUE
        known = self.token_weights.known_before_the_token and self.weight_scheme is Scheme.NONE
        if not centred and not known:
            raise ConfigError(
                "these weights depend on the sampled token or on what follows, so that the constant in the advantage "
                "of objective.mode=opd_plus would push the student; set objective.mode=opd_plus_centred or "
                "objective.baseline=value"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """How the student takes its steps (AdamW)."""

    path = "optimizer"
    learning_rate: float = number(1e-3, above=0)
    """Peak learning rate of AdamW, above 0."""
    weight_decay: float = number(0.0, low=0)
    """Decoupled weight decay, 0 or more."""
    warmup_steps: int = number(0, low=0)
    """Optimiser updates over which the learning rate rises from 0; 0 or more."""
    schedule: Schedule = Schedule.CONSTANT
    """Learning rate after the warm-up."""
    max_grad_norm: float = number(1.0, above=0)
    """Gradients are scaled down to this norm, above 0."""
    updates_per_step: int = number(1, low=1)
    """Optimiser updates per step, each on its own share of the problems; 1 or more."""
    tokens_per_microbatch: int = number(8192, low=1)
    """Padded tokens in one forward and backward pass, 1 or more; memory and padding, not results, depend on it. Of a
    longer row, or of rows of an episode that must be seen together, there is one at a time."""
    sft_learning_rate: float = number(1e-3, above=0)
    """Learning rate of the supervised steps before distillation (run.sft_steps), above 0."""
