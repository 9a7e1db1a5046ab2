"""From log-ratios to advantages: what each token that the student sampled is worth.

``log_ratio = log u = teacher log-prob - student log-prob`` of the sampled token. With a divergence's f:

- ``opd``: ``-f(u)``, the stop-gradient reward. Biased for every divergence but reverse KL.
- ``opd_plus``: ``w_f(u) = -f(u) + u f'(u)``, exactly the gradient of -D_f (OPD+, arXiv 2606.01039).
- ``opd_plus_centred`` (default): ``w_f(u) - f'(1)``. The constant changes no expected gradient and lowers
  its variance; the advantage is 0 at agreement, positive where the teacher likes the token better.

Worked example::

    >>> advantage(torch.tensor([0.0, 1.0]), "forward_kl")
    tensor([0.0000, 1.7183])
    >>> advantage(torch.tensor([[1.0, 7.0, 2.0]]), gamma=0.5, mask=torch.tensor([[True, False, True]]))
    tensor([[2., 0., 2.]])

Advantages are never whitened or normalised: that would flip signs, which here carry the meaning.

Test it alone: ``pytest tests/trainer/math/test_advantages.py``
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_env.trainer.math.divergences import Divergence, get_divergence
from opd_env.trainer.math.loss import scaled
from opd_env.trainer.math.modes import Mode


def advantage(
    log_ratio: Tensor,
    divergence: str | Divergence = "reverse_kl",
    mode: str | Mode = Mode.OPD_PLUS_CENTRED,
    *,
    gamma: float = 0.0,
    mask: Tensor | None = None,
    baseline: Tensor | None = None,
    weights: Tensor | None = None,
    clip_log_ratio: float | None = None,
) -> Tensor:
    """The advantage of every sampled token.

    Own token by ``mode``; with ``gamma`` > 0 also ``Σ_{n>k} γ^(n-k) (-f(u_n))`` over the student's own later
    tokens, across turns. n counts sampled tokens only: tool output in between neither adds nor discounts.

    Args:
        log_ratio: log u in nats; any shape, ``[B, T]`` with one episode per row when ``gamma`` > 0. Entries
            outside ``mask`` may hold anything.
        divergence: a name or a ``Divergence``.
        mode: a ``Mode`` or its value.
        gamma: weight of later tokens, 0 to 1.
        mask: True where the student sampled the token; the result is 0 elsewhere. Needed when ``gamma`` > 0.
        baseline: ``E_p[w_f(u)]`` at each prefix, same shape (``full_divergence`` returns it): subtracted
            from ``w_f`` instead of the mode's constant. Not for mode ``opd``.
        weights: how much the divergence at each token counts, 0 or more, same shape; None for 1. With ``gamma`` > 0
            they also weigh the token's share in the advantages of earlier ones.
        clip_log_ratio: bound on ``|log u|`` before anything else; None for no bound.

    Returns:
        Advantages, detached, with the shape and dtype of ``log_ratio``. Finite for every log u but NaN: what
        does not fit the dtype (reverse KL of a forbidden token, forward KL beyond log u = 88) saturates at its
        largest number, and the loss refuses it.

    Raises:
        ValueError: an option is unknown, out of range, or makes no sense with another.
    """
    if isinstance(divergence, str):
        divergence = get_divergence(divergence)
    mode = parse_mode(mode)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} must lie between 0 (own token only) and 1 (undiscounted)")
    for name, tensor in {"mask": mask, "baseline": baseline, "weights": weights}.items():
        if tensor is not None and tensor.shape != log_ratio.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, log_ratio {tuple(log_ratio.shape)}; must be equal"
            )
    if gamma > 0 and (mask is None or log_ratio.dim() != 2):
        raise ValueError(
            f"gamma={gamma} sums over later tokens of an episode: it needs log_ratio of shape [B, T], got "
            f"{tuple(log_ratio.shape)}, and the mask of own tokens, got {'none' if mask is None else 'one'}"
        )
    if clip_log_ratio is not None and not clip_log_ratio > 0:
        raise ValueError(f"clip_log_ratio={clip_log_ratio} must be positive, or None for no bound")
    if baseline is not None and mode is Mode.OPD:
        raise ValueError("baseline is E_p[w_f(u)], the mean of the OPD+ weight; use mode='opd_plus' with it")
    log_ratio = log_ratio.detach()
    if clip_log_ratio is not None:
        log_ratio = log_ratio.clamp(-clip_log_ratio, clip_log_ratio)
    if mode is Mode.OPD:
        advantages = divergence.minus_f(log_ratio)
    elif baseline is not None:
        advantages = divergence.weight(log_ratio) - baseline.detach().to(log_ratio.dtype)
    elif mode is Mode.OPD_PLUS:
        advantages = divergence.weight(log_ratio)
    else:
        advantages = divergence.centred_weight(log_ratio)
    if weights is not None:
        advantages = scaled(advantages, weights)
    if gamma > 0 and mask is not None:
        rewards = divergence.minus_f(log_ratio)
        rewards = rewards if weights is None else scaled(rewards, weights)
        advantages = advantages + discounted_future_sum(rewards, mask.bool(), gamma)
    largest = torch.finfo(advantages.dtype).max
    advantages = advantages.clamp(-largest, largest)
    return advantages if mask is None else torch.where(mask.bool(), advantages, 0.0)


def group_relative(rewards_E: Tensor, groups_E: Tensor) -> Tensor:
    """Each episode's reward minus the mean of the *other* episodes of its group.

    Leaving the own reward out keeps the policy gradient unbiased (RLOO, arXiv 2402.14740): ``Σ_n A ∇log p(y_n)`` is
    the gradient of the expected reward. It is not divided by the group's spread, which would weigh problems by how
    rarely they are solved (arXiv 2503.20783). An episode without others gets 0: nothing to compare it with.

    Args:
        rewards_E: one per episode.
        groups_E: which episodes are of the same problem; any integers.
    """
    group_E = torch.unique(groups_E, return_inverse=True)[1]
    sums_G = rewards_E.new_zeros(len(rewards_E)).index_add(0, group_E, rewards_E)
    others_E = torch.bincount(group_E, minlength=len(rewards_E))[group_E] - 1
    mean_E = (sums_G[group_E] - rewards_E) / others_E.clamp(min=1)
    return torch.where(others_E > 0, rewards_E - mean_E, 0.0)


def discounted_future_sum(values_BT: Tensor, mask_BT: Tensor, gamma: float) -> Tensor:
    """``Σ_{n>k} γ^(n-k) value_n`` over each row's masked entries, counted among themselves.

    Doubling instead of a loop over tokens or a division by γ^k (which underflows): after step j every entry
    holds the sum of its next 2^j terms, so T tokens take log2(T) vectorised steps.

    Args:
        values_BT: entries outside the mask are ignored, whatever they hold.
        mask_BT: boolean.
        gamma: 0 to 1.

    Returns:
        Shape ``[B, T]``; 0 outside the mask.
    """
    rows, length = values_BT.shape
    rank_BT = torch.where(mask_BT, mask_BT.cumsum(1) - 1, length)  # the place among the row's own; others share a spare
    own_BT = values_BT.new_zeros(rows, length + 1).scatter(1, rank_BT, torch.where(mask_BT, values_BT, 0.0))
    sums_BT = gamma * torch.nn.functional.pad(own_BT[:, 1:length], (0, 2))
    reach, factor = 1, gamma
    while reach < length:
        sums_BT = sums_BT + factor * torch.nn.functional.pad(sums_BT[:, reach:], (0, reach))
        reach, factor = 2 * reach, factor * factor
    return torch.where(mask_BT, sums_BT.gather(1, rank_BT), 0.0)


def clip_fraction(log_ratio: Tensor, mask: Tensor, clip_log_ratio: float) -> float:
    """Share of the sampled tokens whose ``|log u|`` exceeds the bound; 0 when no token was sampled."""
    clipped = (log_ratio.abs() > clip_log_ratio) & mask.bool()
    return float(clipped.sum() / mask.sum().clamp(min=1))


def parse_mode(mode: str) -> Mode:
    """The mode of that name; a ``ValueError`` lists them."""
    if mode not in list(Mode):
        raise ValueError(f"mode={mode!r} is none of {', '.join(Mode)}")
    return Mode(mode)
