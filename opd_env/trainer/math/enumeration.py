"""A world small enough to count out: two distributions, and what an update does there in expectation.

Worked example::

    world = World.random(vocab=50, seed=0)
    rows_VV = world.updates(advantage(world.log_ratio_V, "jsd"))   # the update that each sample would cause
    measure([world], lambda world: world.gradient(get_divergence("jsd")), lambda world: rows_VV).verdict

Test it alone: ``pytest tests/trainer/math/test_certify.py``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from opd_env.trainer.math.divergences import Divergence
from opd_env.trainer.math.loss import policy_loss

LOGIT_SCALE = 0.65
"""Standard deviation of the random logits: student and teacher are then about 0.4 nats apart."""


class Verdict(StrEnum):
    """How an expected update relates to the exact gradient."""

    EXACT = "exact"
    """Cosine above 0.999999 and relative error below 1e-6, for every pair of distributions."""
    BIASED = "biased"
    """Another direction or size."""
    ZERO = "zero"
    """No expected update at all: only noise."""


@dataclass(frozen=True)
class World:
    """A student and a teacher over V tokens, in float64."""

    student_V: Tensor
    """Logits, a leaf that requires a gradient."""
    teacher_V: Tensor
    """Logits."""

    @classmethod
    def random(cls, vocab: int, seed: int) -> World:
        """Independent normal logits for both."""
        generator = torch.Generator().manual_seed(seed)
        student_V, teacher_V = LOGIT_SCALE * torch.randn(2, vocab, generator=generator, dtype=torch.float64)
        return cls(student_V.requires_grad_(), teacher_V)

    @property
    def logprobs_V(self) -> Tensor:
        """The student's, with gradient."""
        return self.student_V.log_softmax(0)

    @property
    def log_ratio_V(self) -> Tensor:
        """log u of every token, detached."""
        return self.teacher_V.log_softmax(0) - self.logprobs_V.detach()

    def backward(self, loss: Tensor) -> Tensor:
        """The gradient of a loss with respect to the student's logits, ``[V]``."""
        return torch.autograd.grad(loss, self.student_V)[0]

    def gradient(self, divergence: Divergence, coarsen: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """Autograd's gradient of ``D_f(q || p) = Σ p f(q / p)``: the definition, in u."""
        p, q = coarsen(self.student_V.softmax(0)), coarsen(self.teacher_V.softmax(0))
        return self.backward((p * divergence.f(q / p)).sum())

    def updates(self, advantages_V: Tensor) -> Tensor:
        """The gradient of the training loss on each possible sample: ``[V, V]``, one row per token."""

        def loss_of(logprobs_V: Tensor) -> Tensor:
            everywhere = torch.ones_like(logprobs_V, dtype=torch.bool)
            return policy_loss(logprobs_V, logprobs_V.detach(), advantages_V, everywhere, num_tokens=1)

        return self.updates_of(loss_of)

    def updates_of(self, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The same for any loss of the log-probs that adds up over tokens: ``(∂loss / ∂logprob_v) ∇logprob_v``."""
        leaf_V = self.logprobs_V.detach().requires_grad_()
        (slope_V,) = torch.autograd.grad(loss_of(leaf_V), leaf_V)
        jacobian_VV = torch.eye(len(leaf_V), dtype=leaf_V.dtype) - leaf_V.detach().exp()  # of log softmax: e_v - p
        return slope_V[:, None] * jacobian_VV


@dataclass(frozen=True)
class Measurement:
    """An expected update beside the exact gradient."""

    cosine: float
    """Mean over worlds; 0 for an update that is 0."""
    relative_error: float
    """``|update - exact| / |exact|``, the largest over worlds."""
    variance: float
    """Of one sample's update, summed over coordinates; mean over worlds. 0 where nothing is sampled."""
    verdict: Verdict


def measure(
    worlds: Sequence[World], exact: Callable[[World], Tensor], update: Callable[[World], Tensor]
) -> Measurement:
    """Compares over all worlds.

    Args:
        worlds: at least one.
        exact: the gradient that is wanted, ``[V]``.
        update: ``[V, V]``, the update of each possible sample, or ``[V]`` where nothing is sampled.
    """
    cosines, errors, variances, sizes = [], [], [], []
    for world in worlds:
        exact_V, given = exact(world), update(world)
        p_V = world.logprobs_V.detach().exp()
        mean_V = given if given.dim() == 1 else p_V @ given
        variances.append(0.0 if given.dim() == 1 else float(p_V @ (given - mean_V).square().sum(1)))
        sizes.append(float(mean_V.norm() / exact_V.norm()))
        cosines.append(float(torch.cosine_similarity(mean_V, exact_V, dim=0)) if sizes[-1] > 1e-9 else 0.0)
        errors.append(float((mean_V - exact_V).norm() / exact_V.norm()))
    if max(sizes) <= 1e-9:
        verdict = Verdict.ZERO
    elif min(cosines) > 0.999999 and max(errors) < 1e-6:
        verdict = Verdict.EXACT
    else:
        verdict = Verdict.BIASED
    return Measurement(sum(cosines) / len(worlds), max(errors), sum(variances) / len(worlds), verdict)
