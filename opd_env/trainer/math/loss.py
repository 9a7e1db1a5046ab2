"""The policy loss: ``L = -(1/N) Σ_n m_n ρ_n A_n`` with ``ρ = p_θ(y_n) / μ(y_n)``.

m marks the tokens that the student sampled, μ is the policy that sampled them (its log-probs were recorded
then), and N is the number of sampled tokens of the **whole optimiser batch**, so that micro-batches, padding
and the number of processes change nothing. The gradient reaches θ through ρ only; advantages are constants.

Worked example::

    logprobs_BT = …                       # of the current student, with gradient
    loss = policy_loss(logprobs_BT, sampled_logprobs_BT, advantages_BT, mask_BT, num_tokens)
    loss.backward()                       # -(1/N) Σ ρ A ∇log p: one OPD+ step

Test it alone: ``pytest tests/trainer/math/test_loss.py``
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    num_tokens: int | float | Tensor,
    *,
    clip_ratio: float | None = None,
    truncate_weight: float | None = None,
) -> Tensor:
    """``-(1/N) Σ m ρ A``, a scalar.

    Entries outside the mask contribute exactly 0, to the value and to the gradient, whatever they hold.

    Args:
        logprobs: of the sampled tokens under the current student, with gradient; any shape.
        behaviour_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: constants (any gradient is cut); same shape.
        mask: True where the student sampled the token; same shape.
        num_tokens: N, the sampled tokens of the whole optimiser batch (over all micro-batches; where
            gradients are averaged over processes rather than summed, N divided by their number).
        clip_ratio: ε of the PPO clip ``min(ρ A, clip(ρ, 1-ε, 1+ε) A)``; None for none.
        truncate_weight: C of truncated importance weights: ``min(ρ, C) A ∇log p``; None for none.

    Raises:
        ValueError: shapes differ, N is not positive, both kinds of bound are given, or an advantage or
            log-prob of a sampled token is not finite or saturated (the message has its index).
    """
    _check(logprobs, behaviour_logprobs, advantages, mask, clip_ratio, truncate_weight)
    _check_count(num_tokens)
    mask = mask.bool()
    advantages = _only(mask, advantages.detach())
    ratio = _ratio(logprobs, behaviour_logprobs, mask)
    if truncate_weight is not None:
        ratio = ratio * (truncate_weight / ratio.detach()).clamp(max=1)
    weighted = ratio * advantages
    if clip_ratio is not None:
        weighted = torch.minimum(weighted, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages)
    return -_only(mask, weighted).sum() / num_tokens


def scaled(advantages: Tensor, factor: float | Tensor) -> Tensor:
    """``factor * advantages``, but 0 where the factor is 0, and infinite where the advantage was saturated.

    So a token that is left out cannot spoil a sum, and one that is refused stays refused, however small its factor.

    Args:
        advantages: any shape.
        factor: 0 or more; a number, or one per advantage.
    """
    factor = torch.as_tensor(factor, dtype=advantages.dtype, device=advantages.device)
    saturated = advantages.abs() >= _LARGEST
    values = torch.where(saturated, advantages.sign() * torch.inf, advantages * factor)
    return torch.where(factor > 0, values, 0.0)


def mean_loss(loss_N: Tensor, num_tokens: int | float | Tensor) -> Tensor:
    """``(1/N) Σ loss_n``, a scalar: the loss of the ``full`` estimator, N as in ``policy_loss``.

    Raises:
        ValueError: N is not positive, or the divergence is not finite at some prefix.
    """
    _check_count(num_tokens)
    bad = ~loss_N.isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"the divergence is not finite at sampled token {int(bad.nonzero()[0])} of {len(loss_N)} "
            f"({int(bad.sum())} such): {_EXTREME}"
        )
    return loss_N.sum() / num_tokens


@dataclass(frozen=True)
class LossStatistics:
    """What to watch of one loss computation, over its sampled tokens; all 0 when there are none."""

    ratio_p99: float
    """99th percentile of ρ."""
    ratio_bounded_fraction: float
    """Share of tokens whose update the PPO clip or the truncation changed."""
    ratio_log_mean: float
    """Mean of log ρ: an estimate of -KL(μ || p), 0 on-policy."""
    ratio_sample_size: float
    """Effective sample size ``(Σρ)² / (N Σρ²)``, as a share of the tokens: 1 on-policy."""
    logprob_gap_max: float
    """Largest ``|log p - log μ|``."""
    advantage_mean: float
    advantage_max_abs: float


@torch.no_grad()
def loss_statistics(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_ratio: float | None = None,
    truncate_weight: float | None = None,
) -> LossStatistics:
    """Statistics of the same computation as ``policy_loss``; arguments and errors as there."""
    _check(logprobs, behaviour_logprobs, advantages, mask, clip_ratio, truncate_weight)
    mask = mask.bool()
    if not bool(mask.any()):
        return LossStatistics(*(0.0,) * 7)
    gap = (logprobs - behaviour_logprobs)[mask].float()
    values = advantages[mask].float()
    ratio = gap.exp()
    weight = (gap.double() - gap.double().max()).exp()  # ρ up to a factor, so that no square overflows
    bounded = torch.zeros_like(mask[mask])
    if clip_ratio is not None:
        bounded = torch.where(values > 0, ratio > 1 + clip_ratio, (ratio < 1 - clip_ratio) & (values < 0))
    if truncate_weight is not None:
        bounded = ratio > truncate_weight
    return LossStatistics(
        ratio_p99=float(ratio.sort().values[int(0.99 * (len(ratio) - 1))]),
        ratio_bounded_fraction=float(bounded.float().mean()),
        ratio_log_mean=float(gap.mean()),
        ratio_sample_size=float(weight.sum().square() / (len(weight) * weight.square().sum())),
        logprob_gap_max=float(gap.abs().max()),
        advantage_mean=float(values.mean()),
        advantage_max_abs=float(values.abs().max()),
    )


_LARGEST = 1e38
"""Just below what float32 and bfloat16 hold, where advantages saturate; NaN is not below it either."""
_EXTREME = "the teacher forbids a token or log u is extreme; set clip_log_ratio"


def _check_count(num_tokens: int | float | Tensor) -> None:
    if not num_tokens > 0:
        raise ValueError(
            f"num_tokens={float(num_tokens):g} must be positive: all sampled tokens of the optimiser batch"
        )


def _only(mask: Tensor, values: Tensor) -> Tensor:
    """Values inside the mask, 0 outside: before any product, since 0 * inf is NaN in value and gradient."""
    return torch.where(mask, values, 0.0)


def _ratio(logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor) -> Tensor:
    """ρ inside the mask, 1 outside."""
    wide = torch.promote_types(logprobs.dtype, torch.float32)
    return (_only(mask, logprobs.to(wide)) - _only(mask, behaviour_logprobs.detach().to(wide))).exp()


def _check(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_ratio: float | None,
    truncate_weight: float | None,
) -> None:
    named = {"behaviour_logprobs": behaviour_logprobs, "advantages": advantages, "mask": mask}
    for name, tensor in named.items():
        if tensor.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, logprobs {tuple(logprobs.shape)}; give equal shapes"
            )
    if clip_ratio is not None and not 0 < clip_ratio < 1:
        raise ValueError(f"clip_ratio={clip_ratio} must lie between 0 and 1 (0.2 is usual), or be None")
    if truncate_weight is not None and not truncate_weight >= 1:
        raise ValueError(f"truncate_weight={truncate_weight} must be at least 1 (the on-policy weight), or None")
    if clip_ratio is not None and truncate_weight is not None:
        raise ValueError("clip_ratio and truncate_weight bound the same importance weight; give one of them")
    advice = {
        "advantages": _EXTREME,
        "logprobs": "a token of probability 0 cannot have been sampled; check mask and positions",
        "behaviour_logprobs": "the log-prob recorded at sampling is finite; check mask and positions",
    }
    for name, tensor in {
        "advantages": advantages,
        "logprobs": logprobs,
        "behaviour_logprobs": behaviour_logprobs,
    }.items():
        bad = mask.bool() & ~(tensor.abs() < _LARGEST)
        if bool(bad.any()):
            index = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"{name}[{', '.join(map(str, index))}] = {float(tensor[index].detach()):g} at a sampled token "
                f"({int(bad.sum())} such): {advice[name]}"
            )
