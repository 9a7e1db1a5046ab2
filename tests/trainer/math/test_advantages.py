"""Advantages: modes, baselines, masks, and the discounted sum over later tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_env.trainer.math.advantages import advantage, clip_fraction, discounted_future_sum, group_relative
from opd_env.trainer.math.divergences import get_divergence, list_divergences
from opd_env.trainer.math.loss import policy_loss
from opd_env.trainer.math.modes import Mode

LOG_RATIO = torch.linspace(-3, 3, 13, dtype=torch.float64)


def test_modes_are_the_three_functions_of_the_divergence():
    divergence = get_divergence("forward_kl")
    u = LOG_RATIO.exp()
    torch.testing.assert_close(advantage(LOG_RATIO, divergence, "opd"), -u * LOG_RATIO)
    torch.testing.assert_close(advantage(LOG_RATIO, divergence, Mode.OPD_PLUS), u)
    torch.testing.assert_close(advantage(LOG_RATIO, "forward_kl"), u - 1)


def test_default_is_centred_reverse_kl_the_log_ratio_itself():
    assert advantage(LOG_RATIO).equal(LOG_RATIO)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "hellinger", "pearson_chi2", "neyman_chi2"])
def test_centred_advantage_is_zero_at_agreement_and_has_the_sign_of_the_log_ratio(name):
    assert bool((advantage(LOG_RATIO, name).sign() == LOG_RATIO.sign()).all())


def test_a_baseline_takes_the_place_of_the_constant():
    baseline = torch.full_like(LOG_RATIO, -1.25)  # for reverse KL -1 - KL(p || q)
    for mode in (Mode.OPD_PLUS, Mode.OPD_PLUS_CENTRED):
        torch.testing.assert_close(advantage(LOG_RATIO, mode=mode, baseline=baseline), LOG_RATIO + 0.25)


def test_clipping_bounds_the_log_ratio_first():
    clipped = advantage(torch.tensor([-math.inf, -9.0, 0.5, 9.0]), "forward_kl", clip_log_ratio=2.0)
    torch.testing.assert_close(clipped, torch.tensor([-2.0, -2.0, 0.5, 2.0]).expm1())


@pytest.mark.parametrize(
    "name", ["reverse_kl", "forward_kl", "jsd", "jeffreys", "neyman_chi2", "pearson_chi2", "alpha"]
)
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_bound_every_advantage_is_finite_even_for_a_forbidden_token(name, mode, dtype):
    log_ratio = torch.tensor([-math.inf, -100.0, 0.0, 100.0, math.inf], dtype=dtype)
    advantages = advantage(log_ratio, name, mode, clip_log_ratio=10.0)
    assert advantages.dtype == dtype
    assert bool(advantages.isfinite().all())


@pytest.mark.parametrize("name", list_divergences())
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_every_advantage_is_finite_and_what_does_not_fit_is_refused_by_the_loss(name, mode, dtype, gamma):
    log_ratio = torch.tensor([[-math.inf, -100.0, -1.0, 0.0, 1.0, 100.0]], dtype=dtype)
    mask = torch.ones_like(log_ratio, dtype=torch.bool)
    advantages = advantage(log_ratio, name, mode, gamma=gamma, mask=mask)
    assert bool(advantages.isfinite().all())
    zero = torch.zeros_like(log_ratio)
    saturated = advantages.abs() > 1e38
    if bool(saturated.any()):
        column = int(saturated.int().argmax())
        with pytest.raises(ValueError, match=rf"advantages\[0, {column}\] = .* set clip_log_ratio"):
            policy_loss(zero, zero, advantages, mask, 6)
    assert bool(policy_loss(zero, zero, advantages, ~saturated, 6).isfinite())


def test_result_is_detached_and_zero_outside_the_mask_whatever_is_there():
    log_ratio = torch.tensor([[1.0, math.nan, math.inf, 2.0]], requires_grad=True)
    mask = torch.tensor([[True, False, False, True]])
    for gamma, expected in ((0.0, [[1.0, 0.0, 0.0, 2.0]]), (0.5, [[2.0, 0.0, 0.0, 2.0]])):
        advantages = advantage(log_ratio, mask=mask, gamma=gamma)
        assert advantages.tolist() == expected
        assert not advantages.requires_grad


def by_loop(values: list[float], mask: list[bool], gamma: float) -> list[float]:
    """The definition, token by token from the end."""
    sums, future = [0.0] * len(values), 0.0
    for k in reversed(range(len(values))):
        if mask[k]:
            sums[k] = future
            future = gamma * (values[k] + future)
    return sums


rows = st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=1, max_size=40)


@given(row=rows, gamma=st.one_of(st.sampled_from([0.0, 1.0, 1e-8]), st.floats(0, 1)))
@settings(max_examples=300, deadline=None)
def test_later_tokens_add_up_as_in_a_loop(row, gamma):
    values, mask = [value for value, _ in row], [own for _, own in row]
    got = discounted_future_sum(torch.tensor([values], dtype=torch.float64), torch.tensor([mask]), gamma)
    assert got[0].tolist() == pytest.approx(by_loop(values, mask, gamma), rel=1e-10, abs=1e-9)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.999, 1.0])
def test_later_tokens_add_up_over_thousands_of_tokens_in_float32(gamma):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5000, generator=generator)
    mask = torch.rand(3, 5000, generator=generator) < 0.7
    got = discounted_future_sum(values, mask, gamma)
    exact = torch.tensor([by_loop(v, m, gamma) for v, m in zip(values.tolist(), mask.tolist(), strict=True)])
    assert float((got - exact).abs().max()) < 1e-3
    relative = float((got - exact).norm() / exact.norm())
    assert relative < 1e-5


@given(row=rows, gamma=st.floats(0, 1), left=st.integers(0, 5), right=st.integers(0, 5))
@settings(deadline=None)
def test_padding_and_tool_output_in_between_change_nothing(row, gamma, left, right):
    own = [value for value, is_own in row if is_own]
    compact = advantage(_row(own), "jsd", gamma=gamma, mask=torch.ones(1, len(own), dtype=torch.bool))
    log_ratio = _row([math.nan] * left + [value if is_own else math.nan for value, is_own in row] + [math.nan] * right)
    mask = torch.tensor([[False] * left + [is_own for _, is_own in row] + [False] * right])
    spread = advantage(log_ratio, "jsd", gamma=gamma, mask=mask)
    torch.testing.assert_close(spread[mask], compact[0], rtol=1e-12, atol=1e-12)


def _row(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize("mode", list(Mode))
def test_later_tokens_enter_with_minus_f_in_every_mode(mode):
    log_ratio, mask = _row([0.3, -0.7]), torch.ones(1, 2, dtype=torch.bool)
    both = advantage(log_ratio, "forward_kl", mode, gamma=0.25, mask=mask)
    own = advantage(log_ratio, "forward_kl", mode)
    later = -math.exp(-0.7) * -0.7
    assert (both - own)[0].tolist() == pytest.approx([0.25 * later, 0.0])


def test_clip_fraction_counts_own_tokens_only():
    log_ratio = torch.tensor([9.0, -9.0, 1.0, 9.0, -math.inf])
    assert clip_fraction(log_ratio, torch.tensor([True, False, True, True, True]), 5.0) == 0.75
    assert clip_fraction(log_ratio, torch.zeros(5, dtype=torch.bool), 5.0) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, "gamma=1.5 must lie between 0"),
        ({"gamma": math.nan}, "gamma=nan must lie between 0"),
        ({"gamma": 0.5}, r"shape \[B, T\], got \(13,\)"),
        ({"gamma": 0.5, "mask": torch.ones(13, dtype=torch.bool)}, r"shape \[B, T\], got \(13,\)"),
        ({"mode": "opd+"}, "is none of opd, opd_plus, opd_plus_centred"),
        ({"divergence": "kl"}, "known: reverse_kl"),
        ({"clip_log_ratio": 0.0}, "must be positive"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask has shape \(3,\), log_ratio \(13,\)"),
        ({"baseline": torch.zeros(3)}, r"baseline has shape \(3,\), log_ratio \(13,\)"),
        ({"baseline": torch.zeros(13), "mode": "opd"}, "use mode='opd_plus'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        advantage(LOG_RATIO, **options)


def test_a_reward_counts_relative_to_the_others_of_its_group():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    groups = torch.tensor([7, 3, 7, 7, 3, 5])
    expected = torch.tensor([1 - 0.5, 0 - 1, 0 - 1, 1 - 0.5, 1 - 0, 0])  # the last one has no others
    torch.testing.assert_close(group_relative(rewards, groups), expected)
    assert group_relative(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
