"""Divergences: the published formulas, their derivatives, their range, and the checks on a user's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_env.trainer.math.divergences import Divergence, get_divergence, list_divergences, register_divergence

# The table of OPD+ (arXiv 2606.01039): name, f(u), w_f(u), f'(1), written plainly and independently of the code.
TABLE: list[tuple[str, dict[str, float], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], float]] = [
    ("reverse_kl", {}, lambda u: -u.log(), lambda u: u.log() - 1, -1),
    ("forward_kl", {}, lambda u: u * u.log(), lambda u: u, 1),
    ("jsd", {}, lambda u: (u * u.log() - (1 + u) * ((1 + u) / 2).log()) / 2, lambda u: ((1 + u) / 2).log() / 2, 0),
    ("hellinger", {}, lambda u: (1 - u.sqrt()) ** 2, lambda u: u.sqrt() - 1, 0),
    ("pearson_chi2", {}, lambda u: (u - 1) ** 2, lambda u: u**2 - 1, 0),
    ("neyman_chi2", {}, lambda u: (1 - u) ** 2 / u, lambda u: 2 - 2 / u, 0),
    ("total_variation", {}, lambda u: (u - 1).abs() / 2, lambda u: (u - 1).sign() / 2, 0),
    ("jeffreys", {}, lambda u: (u - 1) * u.log(), lambda u: u - 1 + u.log(), 0),
    ("alpha", {"alpha": 0}, lambda u: u - 1 - u.log(), lambda u: u.log(), 0),
    ("alpha", {"alpha": 1}, lambda u: u * u.log() - u + 1, lambda u: u - 1, 0),
    ("alpha", {"alpha": 0.5}, lambda u: 2 * (1 - u.sqrt()) ** 2, lambda u: 2 * (u.sqrt() - 1), 0),
    ("alpha", {"alpha": 2}, lambda u: (u - 1) ** 2 / 2, lambda u: (u**2 - 1) / 2, 0),
    ("alpha", {"alpha": -1}, lambda u: (1 - u) ** 2 / u / 2, lambda u: 1 - 1 / u, 0),
    ("alpha", {"alpha": 0.7}, lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.7 * -0.3), lambda u: (u**0.7 - 1) / 0.7, 0),
    (
        "skew_jsd",
        {"beta": 0.1},
        lambda u: 0.1 * u * u.log() - (0.9 + 0.1 * u) * (0.9 + 0.1 * u).log(),
        lambda u: 0.9 * (0.9 + 0.1 * u).log(),
        0,
    ),
]
IDS = [name + "".join(map(str, params.values())) for name, params, *_ in TABLE]
BUILT_IN = [get_divergence(name, **params) for name, params, *_ in TABLE]
EXTREMES = (-100.0, -60.0, -20.0, -1.0, 0.0, 1.0, 20.0, 60.0, 100.0)


@pytest.mark.parametrize(("name", "params", "f", "weight", "slope"), TABLE, ids=IDS)
def test_formulas_are_those_of_the_table(name, params, f, weight, slope):
    divergence = get_divergence(name, **params)
    log_u = torch.linspace(-6, 6, 121, dtype=torch.float64)
    u = log_u.exp()
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(divergence.f(u), f(u), **close)
    torch.testing.assert_close(divergence.minus_f(log_u), -f(u), **close)
    torch.testing.assert_close(divergence.weight(log_u), weight(u), **close)
    torch.testing.assert_close(divergence.centred_weight(log_u), weight(u) - slope, **close)
    assert divergence.slope_at_one == slope


@pytest.mark.parametrize("divergence", BUILT_IN, ids=IDS)
def test_weight_is_u_times_slope_minus_f_by_autograd(divergence):
    u = torch.linspace(-6, 6, 120, dtype=torch.float64).exp().requires_grad_()  # without u = 1: one f has a kink there
    f = divergence.f(u)
    (slope,) = torch.autograd.grad(f.sum(), u)
    u, f = u.detach(), f.detach()
    torch.testing.assert_close(divergence.weight(u.log()), u * slope - f, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("divergence", BUILT_IN, ids=IDS)
def test_f_and_centred_weight_are_zero_at_agreement(divergence):
    zero = torch.zeros((), dtype=torch.float64)
    assert float(divergence.f(1.0)) == 0
    assert float(divergence.centred_weight(zero)) == 0
    assert float(divergence.minus_f(zero)) == 0
    assert float(divergence.weight(zero)) == divergence.slope_at_one


@pytest.mark.parametrize("divergence", BUILT_IN, ids=IDS)
def test_weight_never_falls_and_has_the_sign_of_the_log_ratio(divergence):
    log_u = torch.linspace(-40, 40, 8001, dtype=torch.float64)
    weight = divergence.centred_weight(log_u)
    assert bool((weight.diff() >= 0).all())
    assert bool((weight.sign() == log_u.sign()).all())


@pytest.mark.parametrize("divergence", BUILT_IN, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("of", ["weight", "centred_weight", "minus_f"])
def test_values_are_right_wherever_the_dtype_can_hold_them_and_infinite_beyond(divergence, dtype, of):
    log_u = torch.tensor(EXTREMES, dtype=torch.float64)
    exact = getattr(divergence, of)(log_u)  # float64 holds exp(300) and more
    got = getattr(divergence, of)(log_u.to(dtype))
    assert got.dtype == dtype
    assert not bool(got.isnan().any())
    fits = exact.abs() < torch.finfo(dtype).max
    assert bool(got[fits].isfinite().all())
    assert bool((got[~fits] == exact[~fits].sign() * math.inf).all())
    if dtype == torch.float32:
        torch.testing.assert_close(got[fits].double(), exact[fits], rtol=5e-5, atol=1e-6)
    else:
        torch.testing.assert_close(got[fits].double(), exact[fits], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("divergence", BUILT_IN, ids=IDS)
def test_float64_reference_of_the_range_test_agrees_with_python(divergence):
    for log_u in (-100.0, 100.0):
        u = math.exp(log_u)
        f = float(divergence.f(torch.tensor(u, dtype=torch.float64)))
        assert -float(divergence.minus_f(torch.tensor(log_u, dtype=torch.float64))) == pytest.approx(f, rel=1e-9)


LIMITS_AT_ZERO = [  # weight, -f
    (-math.inf, -math.inf), (0, 0), (-math.log(2) / 2, -math.log(2) / 2), (-1, -1), (-1, -1), (-math.inf, -math.inf),
    (-0.5, -0.5), (-math.inf, -math.inf), (-math.inf, -math.inf), (-1, -1), (-2, -2), (-0.5, -0.5),
    (-math.inf, -math.inf), (-1 / 0.7, -1 / 0.7), (0.9 * math.log(0.9), 0.9 * math.log(0.9)),
]  # fmt: skip


@pytest.mark.parametrize(("divergence", "limits"), zip(BUILT_IN, LIMITS_AT_ZERO, strict=True), ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_forbidden_token_gets_the_limit_at_zero(divergence, limits, dtype):
    log_u = torch.tensor(-math.inf, dtype=dtype)
    got = [float(divergence.weight(log_u)), float(divergence.minus_f(log_u))]
    assert got == pytest.approx(list(limits), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("divergence", BUILT_IN, ids=IDS)
def test_a_log_ratio_that_is_no_number_stays_none(divergence):
    nan = torch.tensor(math.nan)
    assert all(bool(of(nan).isnan()) for of in (divergence.weight, divergence.centred_weight, divergence.minus_f))


@given(alpha=st.floats(-3, 3), log_u=st.floats(-8, 8))
@settings(deadline=None)
def test_alpha_divergences_are_smooth_in_alpha(alpha, log_u):
    at = torch.tensor(log_u, dtype=torch.float64)
    here, near = get_divergence("alpha", alpha=alpha), get_divergence("alpha", alpha=alpha + 1e-7)
    assert float(here.weight(at)) == pytest.approx(float(near.weight(at)), rel=1e-4, abs=1e-4)
    assert float(here.minus_f(at)) == pytest.approx(float(near.minus_f(at)), rel=1e-4, abs=1e-4)
    assert float(here.minus_f(at)) <= 1e-12


@given(beta=st.floats(0.001, 0.999), log_u=st.floats(-80, 80))
@settings(deadline=None)
def test_skew_jsd_swaps_sides_with_beta(beta, log_u):
    at = torch.tensor(log_u, dtype=torch.float64)
    one, other = get_divergence("skew_jsd", beta=beta), get_divergence("skew_jsd", beta=1 - beta)
    mirrored = math.exp(log_u) * float(other.minus_f(-at))  # D_f(q || p) = D_g(p || q) with f(u) = u g(1/u)
    assert float(one.minus_f(at)) == pytest.approx(mirrored, rel=1e-7, abs=1e-12)


def test_jsd_is_the_balanced_skew_jsd():
    log_u = torch.linspace(-30, 30, 61)
    assert get_divergence("jsd").weight(log_u).equal(get_divergence("skew_jsd", beta=0.5).weight(log_u))


@pytest.mark.parametrize("name", ["jds", "reverse-kl", "REVERSE_KL ", "no such thing"])
def test_unknown_names_are_refused_with_what_is_known(name):
    with pytest.raises(ValueError, match="known: reverse_kl"):
        get_divergence(name)


def test_a_near_miss_is_suggested():
    with pytest.raises(ValueError, match="did you mean 'jsd'"):
        get_divergence("jds")


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("skew_jsd", {"beta": 0.0}, "strictly between"),
        ("skew_jsd", {"beta": 1.0}, "strictly between"),
        ("skew_jsd", {"beta": math.nan}, "strictly between"),
        ("alpha", {"alpha": math.inf}, "finite"),
        ("alpha", {"beta": 0.5}, "one parameter, alpha; got beta"),
        ("jsd", {"beta": 0.5}, "no parameters; got beta"),
    ],
)
def test_wrong_parameters_are_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        get_divergence(name, **params)


def test_every_listed_name_can_be_had():
    assert [get_divergence(name).name.split("(")[0] for name in list_divergences()] == list_divergences()


@pytest.mark.parametrize(("name", "params", "f", "weight", "slope"), TABLE, ids=IDS)
def test_f_alone_is_enough(name, params, f, weight, slope):
    mine = register_divergence("mine", f)
    built_in = get_divergence(name, **params)
    log_u = torch.linspace(-10, 10, 81, dtype=torch.float64)
    torch.testing.assert_close(mine.weight(log_u), built_in.weight(log_u), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.minus_f(log_u), built_in.minus_f(log_u), rtol=1e-9, atol=1e-9)
    assert mine.slope_at_one == pytest.approx(slope, abs=1e-12)
    assert get_divergence("mine") is mine


@pytest.mark.parametrize(
    ("name", "params", "f", "limits"),
    [(name, params, f, limits) for (name, params, f, *_), limits in zip(TABLE, LIMITS_AT_ZERO, strict=True)],
    ids=IDS,
)
def test_autograd_weights_stay_monotone_and_reach_the_limits(name, params, f, limits):
    mine = register_divergence("mine", f)
    weight = mine.weight(torch.linspace(-100, 100, 401, dtype=torch.float64))
    assert bool((weight.diff() >= -1e-5 * (1 + weight[1:].abs())).all())
    assert not bool(weight.isnan().any())
    assert float(mine.weight(torch.tensor(-math.inf))) == pytest.approx(limits[0], rel=1e-5, abs=1e-9)


@given(weights=st.lists(st.floats(0, 5), min_size=4, max_size=4), tilt=st.floats(-5, 5))
@settings(deadline=None)
def test_adding_a_line_through_one_changes_no_weight_but_by_a_constant(weights, tilt):
    if sum(weights) < 1e-3:
        return

    def mixture(u: Tensor) -> Tensor:  # convex: a cone of convex functions
        return -weights[0] * u.log() + weights[1] * u * u.log() + weights[2] * (u - 1) ** 2 + weights[3] * (1 / u - 1)

    plain = register_divergence("plain", mixture)
    tilted = register_divergence("tilted", lambda u: mixture(u) + tilt * (u - 1))
    log_u = torch.linspace(-5, 5, 41, dtype=torch.float64)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(tilted.centred_weight(log_u), plain.centred_weight(log_u), **close)
    torch.testing.assert_close(tilted.weight(log_u), plain.weight(log_u) + tilt, **close)
    torch.testing.assert_close(tilted.minus_f(log_u), plain.minus_f(log_u) - tilt * (log_u.exp() - 1), **close)


def test_reverse_kl_written_as_k3_rewards_nothing_without_the_correction():
    k3 = register_divergence("k3", lambda u: u - 1 - u.log())
    log_u = torch.linspace(-5, 5, 41)
    assert bool((k3.minus_f(log_u) <= 0).all())
    torch.testing.assert_close(k3.weight(log_u), log_u)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda u: u**2, r"f\(1\) = 1, but a divergence needs f\(1\) = 0"),
        (lambda u: -((u - 1) ** 2), "not convex .* at u = "),
        (lambda u: torch.where(u < 5, (u - 1) ** 2, 16 - (u - 5)), "not convex .* at u = 4.9|not convex .* at u = 5"),
        (lambda u: 3 * (u - 1), "linear"),
        (lambda u: (u - 1).sqrt(), "not finite at u = "),
        (lambda u: 0.0, "elementwise"),
        (lambda u: (u - 1).sum(), "elementwise"),
        (lambda u: math.log(u), "must take a torch tensor"),
        (lambda u: (u.detach() - 1) ** 2, "no way from f"),
    ],
)
def test_what_is_no_divergence_is_refused_with_the_place(f, message):
    with pytest.raises(ValueError, match=message):
        register_divergence("mine", f)
    assert "mine" not in list_divergences()


def test_built_in_names_cannot_be_taken():
    with pytest.raises(ValueError, match="built in"):
        register_divergence("jsd", lambda u: (u - 1) ** 2)


def test_stable_forms_are_used_and_checked():
    mine = register_divergence(
        "mine", lambda u: (u - 1) ** 2 / (u + 1), weight=lambda log_u: 3 - _triangular_rest(log_u)
    )
    assert float(mine.weight(torch.tensor(100.0))) == pytest.approx(3)
    with pytest.raises(ValueError, match=r"weight\(log u\) disagrees with f at u = "):
        register_divergence("mine", lambda u: (u - 1) ** 2, weight=lambda log_u: log_u)
    with pytest.raises(ValueError, match=r"minus_f\(log u\) disagrees with f at u = "):
        register_divergence("mine", lambda u: (u - 1) ** 2, minus_f=lambda log_u: -log_u.expm1())


def _triangular_rest(log_u: Tensor) -> Tensor:
    v = torch.exp(-log_u)  # w = 3 - 4 (2 u + 1) / (u + 1)² with v = 1 / u
    return 4 * (2 + v) * v / (1 + v) ** 2


def test_autograd_weights_do_without_outer_gradient_modes():
    mine = register_divergence("mine", lambda u: (u - 1) ** 2)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert float(mine.weight(torch.tensor(math.log(3.0)))) == pytest.approx(8)


def test_a_divergence_is_a_frozen_record():
    assert isinstance(get_divergence("jsd"), Divergence)
    with pytest.raises(AttributeError):
        get_divergence("jsd").name = "other"  # type: ignore[misc]
