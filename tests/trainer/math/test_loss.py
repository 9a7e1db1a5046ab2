"""The policy loss: masks, global normalisation, bounds on the importance ratio, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_env.trainer.math.loss import loss_statistics, mean_loss, policy_loss, scaled


def batch(seed: int = 0, rows: int = 4, length: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 3
    behaviour = logprobs + 0.3 * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    return logprobs.requires_grad_(), behaviour, advantages, mask


def test_value_and_gradient_are_the_formula():
    logprobs, behaviour, advantages, mask = batch()
    loss = policy_loss(logprobs, behaviour, advantages, mask, num_tokens=10)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    expected = -(mask * (logprobs - behaviour).exp() * advantages / 10).detach()
    assert float(loss.detach()) == pytest.approx(float(expected.sum()))
    torch.testing.assert_close(gradient, expected)


def test_on_policy_gradient_is_the_plain_policy_gradient():
    logprobs, _, advantages, mask = batch()
    loss = policy_loss(logprobs, logprobs.detach(), advantages, mask, num_tokens=1)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -(mask * advantages))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "bound", [{}, {"clip_ratio": 0.2}, {"truncate_weight": 1.5}], ids=["plain", "clip", "truncate"]
)
def test_masked_tokens_contribute_exactly_nothing_whatever_they_hold(bad, bound):
    logprobs, behaviour, advantages, mask = batch()
    clean = policy_loss(logprobs, behaviour, advantages, mask, 7, **bound)
    (clean_gradient,) = torch.autograd.grad(clean, logprobs)
    spoilt = [torch.where(mask, tensor.detach(), bad) for tensor in (logprobs, behaviour, advantages)]
    spoilt[0].requires_grad_()
    loss = policy_loss(*spoilt, mask, 7, **bound)
    (gradient,) = torch.autograd.grad(loss, spoilt[0])
    assert loss.equal(clean)
    assert gradient.equal(clean_gradient)
    assert bool((gradient[~mask] == 0).all())


def test_no_gradient_reaches_the_advantages_or_the_behaviour_policy():
    logprobs, behaviour, advantages, mask = batch()
    behaviour.requires_grad_()
    advantages.requires_grad_()
    policy_loss(logprobs, behaviour, advantages, mask, 5).backward()
    assert behaviour.grad is None
    assert advantages.grad is None


@given(cut=st.integers(1, 3), pad_left=st.integers(0, 3), pad_right=st.integers(0, 3), seed=st.integers(0, 20))
@settings(deadline=None)
def test_splits_and_padding_change_nothing(cut, pad_left, pad_right, seed):
    whole = batch(seed)
    count = int(whole[3].sum()) or 1
    expected = policy_loss(*whole, num_tokens=count)
    (gradient,) = torch.autograd.grad(expected, whole[0])
    parts = [
        policy_loss(*(_pad(tensor[rows], pad_left, pad_right) for tensor in whole), num_tokens=torch.tensor(count))
        for rows in (slice(0, cut), slice(cut, None))
    ]
    (split_gradient,) = torch.autograd.grad(parts[0] + parts[1], whole[0])
    torch.testing.assert_close(parts[0] + parts[1], expected)
    torch.testing.assert_close(split_gradient, gradient)


def _pad(tensor: Tensor, left: int, right: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (left, right), value=False if tensor.dtype == torch.bool else 0.0)


def test_an_empty_microbatch_is_a_zero_that_can_be_differentiated():
    logprobs, behaviour, advantages, mask = batch()
    loss = policy_loss(logprobs, behaviour, advantages, torch.zeros_like(mask), 12)
    loss.backward()
    assert float(loss.detach()) == 0
    assert bool((logprobs.grad == 0).all())
    assert loss_statistics(logprobs, behaviour, advantages, torch.zeros_like(mask)).ratio_p99 == 0


def token(ratio: float, advantage: float, **bound: float) -> tuple[float, float]:
    """Loss and gradient of one token."""
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss = policy_loss(logprob, zero, zero + advantage, torch.tensor([True]), 1, **bound)
    (gradient,) = torch.autograd.grad(loss, logprob)
    return float(loss.detach()), float(gradient)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 2, -2.4, 0),
        (1.5, -2, 3, 3),
        (0.5, -2, 1.6, 0),
        (0.5, 2, -1, -1),
        (1.1, 2, -2.2, -2.2),
        (0.9, -2, 1.8, 1.8),
    ],
)
def test_ppo_clip_stops_only_what_would_go_further(ratio, advantage, loss, gradient):
    assert token(ratio, advantage, clip_ratio=0.2) == pytest.approx((loss, gradient))


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (2.0, 2.0), (8.0, 2.0)])
def test_truncation_bounds_the_weight_but_keeps_the_gradient(ratio, weight):
    assert token(ratio, 3, truncate_weight=2.0) == pytest.approx((-3 * weight, -3 * weight))


def test_bfloat16_log_probs_are_subtracted_in_float32():
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16)
    behaviour = torch.tensor([-1.003, -2.004])
    loss = policy_loss(logprobs, behaviour, torch.ones(2), torch.tensor([True, True]), 2)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(-(math.exp(0.003) + math.exp(0.004)) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "advice"), [("advantages", "clip_log_ratio"), ("logprobs", "mask"), ("behaviour_logprobs", "mask")]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_at_sampled_tokens_are_refused_with_their_index(name, advice, bad):
    logprobs, behaviour, advantages, mask = batch()
    tensors = {"logprobs": logprobs.detach().clone(), "behaviour_logprobs": behaviour, "advantages": advantages}
    row, column = mask.nonzero()[3].tolist()
    tensors[name][row, column] = bad
    with pytest.raises(ValueError, match=rf"{name}\[{row}, {column}\] = .*{advice}"):
        policy_loss(**tensors, mask=mask, num_tokens=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "must be positive"),
        ({"num_tokens": math.nan}, "must be positive"),
        ({"num_tokens": 3, "clip_ratio": 1.5}, "between 0 and 1"),
        ({"num_tokens": 3, "truncate_weight": 0.5}, "at least 1"),
        ({"num_tokens": 3, "clip_ratio": 0.2, "truncate_weight": 2.0}, "give one of them"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(*batch(), **options)


def test_shapes_must_be_equal():
    logprobs, behaviour, advantages, mask = batch()
    with pytest.raises(ValueError, match=r"advantages has shape \(4, 5\), logprobs \(4, 6\)"):
        policy_loss(logprobs, behaviour, advantages[:, 1:], mask, 3)


def test_statistics_are_those_of_the_sampled_tokens():
    ratio = torch.tensor([0.5, 1.0, 1.5, 4.0, 99.0])
    advantages = torch.tensor([-1.0, 2.0, 3.0, -4.0, 50.0])
    mask = torch.tensor([True, True, True, True, False])
    statistics = loss_statistics(ratio.log(), torch.zeros(5), advantages, mask)
    assert statistics.ratio_p99 == pytest.approx(1.5)
    assert statistics.logprob_gap_max == pytest.approx(math.log(4))
    assert statistics.ratio_log_mean == pytest.approx(math.log(3) / 4)
    assert statistics.ratio_sample_size == pytest.approx(49 / (4 * 19.5))
    assert statistics.advantage_max_abs == 4
    assert statistics.advantage_mean == 0
    assert statistics.ratio_bounded_fraction == 0
    clipped = loss_statistics(ratio.log(), torch.zeros(5), advantages, mask, clip_ratio=0.2)
    assert clipped.ratio_bounded_fraction == 0.5
    truncated = loss_statistics(ratio.log(), torch.zeros(5), advantages, mask, truncate_weight=2.0)
    assert truncated.ratio_bounded_fraction == 0.25


def test_mean_loss_divides_by_the_global_count_and_refuses_infinite_divergences():
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    assert float(mean_loss(losses, 6).detach()) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"not finite at sampled token 1 of 2 .*clip_log_ratio"):
        mean_loss(torch.tensor([1.0, math.inf]), 2)
    with pytest.raises(ValueError, match="must be positive"):
        mean_loss(losses, 0)


def test_a_factor_scales_but_neither_hides_nor_spreads_a_saturated_advantage():
    largest = torch.finfo(torch.float32).max
    advantages = torch.tensor([2.0, -largest, largest, math.nan])
    assert scaled(advantages, 0.5).tolist()[:3] == [1.0, -math.inf, math.inf]
    assert math.isnan(scaled(advantages, 0.5)[3])
    assert scaled(advantages, torch.tensor([0.5, 0, 0, 0])).tolist() == [1, 0, 0, 0]
