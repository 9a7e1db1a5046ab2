"""f-divergences between teacher q and student p: formulas in a form that can be trained with, by name, and your own.

A divergence is a convex f with f(1) = 0: ``D_f(q || p) = Σ_v p(v) f(u_v)`` with ``u = q / p``. Three functions of
``log u = teacher log-prob - student log-prob`` are all that training needs:

- ``minus_f(log_u)``: ``-f(u)``, the stop-gradient reward of plain on-policy distillation (OPD);
- ``weight(log_u)``: ``w_f(u) = -f(u) + u f'(u)``, the OPD+ weight (arXiv 2606.01039), for which
  ``-∇D_f = E_p[w_f(u) ∇log p]`` holds exactly;
- ``centred_weight(log_u)``: ``w_f(u) - f'(1)``: the same expected gradient, 0 at agreement.

Worked example::

    >>> get_divergence("forward_kl").weight(torch.tensor(0.0))              # w_f(u) = u
    tensor(1.)
    >>> mine = register_divergence("mine", lambda u: (u - 1) ** 2 / (u + 1))   # triangular discrimination
    >>> get_divergence("mine").weight(torch.tensor(1.0))                    # u f'(u) - f(u), f' by autograd
    tensor(1.1378)

Range. Everything is computed from ``log u`` in at least float32 and returned in the dtype that came in. A value is
finite wherever the true value fits the dtype. For ``|log u| <= 100`` in float32 that fails only for what grows like
exp(100) or faster (the weights of forward KL, Jeffreys and Pearson χ² at a large u and of Neyman χ² at a small one;
most ``-f``): there it is ±inf, never NaN. At u = 0 (a teacher that forbids the token) it is the limit: ``-inf`` for
reverse KL, Neyman χ², Jeffreys and alpha <= 0, finite for the others. The loss refuses non-finite advantages;
``clip_log_ratio`` bounds ``|log u|``.

Test it alone: ``pytest tests/trainer/math/test_divergences.py``
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_env.errors import unknown

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """One f-divergence. Make your own with ``register_divergence``; look one up with ``get_divergence``."""

    name: str
    """The registered name, with its parameters: ``jsd``, ``alpha(0.3)``."""
    generator: Elementwise
    """f as a function of u."""
    slope_at_one: float
    """f'(1), the constant by which the centred weight differs from w_f."""
    centred_of_log: Elementwise
    """``w_f(u) - f'(1)`` as a stable function of log u."""
    minus_f_of_log: Elementwise
    """``-f(u)`` as a stable function of log u."""

    def f(self, u: Tensor | float) -> Tensor:
        """f(u), elementwise, for u > 0."""
        return self.generator(torch.as_tensor(u))

    def centred_weight(self, log_u: Tensor) -> Tensor:
        """``w_f(u) - f'(1)``: never decreases in u, 0 at u = 1. Same shape and dtype as ``log_u``."""
        return self.centred_of_log(_at_least_float32(log_u)).to(log_u.dtype)

    def weight(self, log_u: Tensor) -> Tensor:
        """``w_f(u) = -f(u) + u f'(u)``, the OPD+ weight. Same shape and dtype as ``log_u``."""
        return (self.centred_of_log(_at_least_float32(log_u)) + self.slope_at_one).to(log_u.dtype)

    def minus_f(self, log_u: Tensor) -> Tensor:
        """``-f(u)``, the stop-gradient reward. Same shape and dtype as ``log_u``."""
        return self.minus_f_of_log(_at_least_float32(log_u)).to(log_u.dtype)


def _at_least_float32(log_u: Tensor) -> Tensor:
    return log_u.to(torch.promote_types(log_u.dtype, torch.float32))


def _power(log_u: Tensor, exponent: float) -> Tensor:
    """``(u^a - 1) / a``, whose limit at a = 0 is ``ln u``."""
    return log_u if exponent == 0 else torch.expm1(exponent * log_u) / exponent


def _log_mixture(log_u: Tensor, beta: float) -> Tensor:
    """``ln(1 + β (u - 1))``, for u > 1 as ``ln u + ln(1 + (1 - β) (1/u - 1))``, which cannot overflow."""
    share = 0.5 + (0.5 - beta) * log_u.sign()  # β for u < 1, 1 - β for u > 1
    return log_u.relu() + torch.log1p(share * torch.expm1(-log_u.abs()))


def _times_u(log_u: Tensor, factor: Tensor) -> Tensor:
    """``u * factor`` for a factor that grows more slowly than 1/u: 0 at u = 0, not 0 * inf."""
    largest = torch.finfo(factor.dtype).max
    return log_u.exp() * factor.clamp(-largest, largest)


def _sign(log_u: Tensor) -> Tensor:
    return torch.where(log_u.isnan(), log_u, log_u.sign())  # torch.sign(nan) is 0: agreement where there is none


REVERSE_KL = Divergence(
    "reverse_kl",
    generator=lambda u: -u.log(),
    slope_at_one=-1.0,
    centred_of_log=lambda log_u: log_u,
    minus_f_of_log=lambda log_u: log_u,
)
"""KL(p || q): mode-seeking. The only divergence whose stop-gradient reward is already unbiased."""

FORWARD_KL = Divergence(
    "forward_kl",
    generator=lambda u: torch.xlogy(u, u),
    slope_at_one=1.0,
    centred_of_log=torch.expm1,
    minus_f_of_log=lambda log_u: -_times_u(log_u, log_u),
)
"""KL(q || p): mass-covering; the weight is unbounded in u."""

HELLINGER = Divergence(
    "hellinger",
    generator=lambda u: (1 - u.sqrt()) ** 2,
    slope_at_one=0.0,
    centred_of_log=lambda log_u: torch.expm1(log_u / 2),
    minus_f_of_log=lambda log_u: -(torch.expm1(log_u / 2) ** 2),
)
"""Squared Hellinger distance ``Σ (√p - √q)²``."""

PEARSON_CHI2 = Divergence(
    "pearson_chi2",
    generator=lambda u: (u - 1) ** 2,
    slope_at_one=0.0,
    centred_of_log=lambda log_u: torch.expm1(2 * log_u),
    minus_f_of_log=lambda log_u: -(torch.expm1(log_u) ** 2),
)
"""``Σ (q - p)² / p``."""

NEYMAN_CHI2 = Divergence(
    "neyman_chi2",
    generator=lambda u: (1 - u) ** 2 / u,
    slope_at_one=0.0,
    centred_of_log=lambda log_u: -2 * torch.expm1(-log_u),
    minus_f_of_log=lambda log_u: -4 * torch.sinh(log_u / 2) ** 2,
)
"""``Σ (q - p)² / q``."""

TOTAL_VARIATION = Divergence(
    "total_variation",
    generator=lambda u: (u - 1).abs() / 2,
    slope_at_one=0.0,
    centred_of_log=lambda log_u: _sign(log_u) / 2,
    minus_f_of_log=lambda log_u: -torch.expm1(log_u).abs() / 2,
)
"""``½ Σ |q - p|``: bounded weights ±½. f has a kink at u = 1; there f'(1) = 0 and the weight is 0."""

JEFFREYS = Divergence(
    "jeffreys",
    generator=lambda u: (u - 1) * u.log(),
    slope_at_one=0.0,
    centred_of_log=lambda log_u: log_u + torch.expm1(log_u),
    minus_f_of_log=lambda log_u: -torch.expm1(log_u) * log_u,
)
"""KL(q || p) + KL(p || q)."""


def skew_jsd(beta: float = 0.5) -> Divergence:
    """``β KL(q || m) + (1 - β) KL(p || m)`` with the mixture ``m = β q + (1 - β) p``.

    The generalised Jensen–Shannon divergence of GKD (arXiv 2306.13649, equation 1). Its OPD+ weight is
    ``(1 - β) ln(1 + β (u - 1))``. It tends to 0 at both ends of β, where ``D / β`` and ``D / (1 - β)`` tend
    to forward and reverse KL.

    Raises:
        ValueError: β is not strictly between 0 and 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"skew_jsd: beta={beta} must lie strictly between 0 (no teacher) and 1 (no student)")

    def minus_f(log_u: Tensor) -> Tensor:
        log_m_over_p = _log_mixture(log_u, beta)
        return beta * _times_u(log_u, log_m_over_p - log_u) + (1 - beta) * log_m_over_p

    return Divergence(
        f"skew_jsd({beta:g})",
        generator=lambda u: beta * torch.xlogy(u, u) - torch.xlogy(1 + beta * (u - 1), 1 + beta * (u - 1)),
        slope_at_one=0.0,
        centred_of_log=lambda log_u: (1 - beta) * _log_mixture(log_u, beta),
        minus_f_of_log=minus_f,
    )


def alpha(alpha: float = 0.5) -> Divergence:
    """``f(u) = (u^α - α u - (1 - α)) / (α (α - 1))``, the α-divergences (Cressie and Read's power family).

    α = 1 is forward KL, 0 reverse KL, ½ twice the squared Hellinger distance, 2 half of Pearson's and -1
    half of Neyman's χ²; f is written with f'(1) = 0, so its OPD+ weight is simply ``(u^α - 1) / α``.

    Raises:
        ValueError: α is not finite.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: alpha={alpha} must be a finite number (1 is forward KL, 0 is reverse KL)")

    def generator(u: Tensor) -> Tensor:
        if alpha == 0:
            return u - 1 - u.log()
        if alpha == 1:
            return torch.xlogy(u, u) - u + 1
        return (u**alpha - alpha * u - (1 - alpha)) / (alpha * (alpha - 1))

    def minus_f(log_u: Tensor) -> Tensor:
        # Two forms of one expression: each is exact at, and near, one of the removable poles α = 0 and α = 1.
        if alpha <= 0.5:
            return (_power(log_u, alpha) - torch.expm1(log_u)) / (1 - alpha)
        small = (torch.expm1(log_u) - _times_u(log_u, _power(log_u, alpha - 1))) / alpha
        large = -log_u.exp() * (_power(log_u, alpha - 1) + torch.expm1(-log_u)) / alpha
        return torch.where(log_u > 0, large, small)

    return Divergence(
        f"alpha({alpha:g})",
        generator=generator,
        slope_at_one=0.0,
        centred_of_log=lambda log_u: _power(log_u, alpha),
        minus_f_of_log=minus_f,
    )


def _jsd() -> Divergence:
    half = skew_jsd(0.5)
    return Divergence("jsd", half.generator, half.slope_at_one, half.centred_of_log, half.minus_f_of_log)


JSD = _jsd()
"""Jensen–Shannon, ``½ KL(q || m) + ½ KL(p || m)`` with ``m = (q + p) / 2``."""


__all__ = ["Divergence", "get_divergence", "list_divergences", "register_divergence"]

_BUILT_IN: dict[str, Divergence] = {
    divergence.name: divergence
    for divergence in (
        REVERSE_KL, FORWARD_KL, JSD, HELLINGER, PEARSON_CHI2, NEYMAN_CHI2, TOTAL_VARIATION, JEFFREYS,
    )
}  # fmt: skip
_FAMILIES: dict[str, tuple[str, Callable[[float], Divergence]]] = {
    "alpha": ("alpha", alpha),
    "skew_jsd": ("beta", skew_jsd),
}
"""Name -> the one parameter's name, and the constructor."""
_REGISTERED: dict[str, Divergence] = {}


def list_divergences() -> list[str]:
    """All names that ``get_divergence`` knows: built in first, then registered."""
    return [*_BUILT_IN, *_FAMILIES, *_REGISTERED]


def get_divergence(name: str, **params: float) -> Divergence:
    """The divergence of that name.

    Args:
        name: one of ``list_divergences()``.
        params: ``alpha=`` for ``alpha`` and ``beta=`` for ``skew_jsd`` (both 0.5 when left out).

    Raises:
        ValueError: the name is unknown, the divergence has no such parameter, or its value is out of range.
    """
    if name in _FAMILIES:
        parameter, family = _FAMILIES[name]
        if others := set(params) - {parameter}:
            raise ValueError(f"{name} has one parameter, {parameter}; got {', '.join(sorted(others))}")
        return family(params.get(parameter, 0.5))
    found = _BUILT_IN.get(name) or _REGISTERED.get(name)
    if found is None:
        raise ValueError(unknown("divergence", name, list_divergences()))
    if params:
        raise ValueError(f"{name} has no parameters; got {', '.join(sorted(params))}")
    return found


def register_divergence(
    name: str, f: Elementwise, *, weight: Elementwise | None = None, minus_f: Elementwise | None = None
) -> Divergence:
    """Adds a divergence of one's own under ``name``; f is enough, f' comes from autograd.

    f is checked on u from e^-12 to e^12: f(1) = 0, finite, convex, and not linear (then every pair of
    distributions would be at distance 0). It is always evaluated in float64. At a large u, ``u f'(u) -
    f(u)`` is the difference of two huge numbers; where float64 can no longer tell it, the weight is held at
    its last sure value (it never decreases, so its sign stays right). Give ``weight`` to be exact there too.

    Args:
        name: not yet taken by a built-in divergence. Registering one's own name again replaces it.
        f: convex, elementwise on a float64 tensor of u > 0, made of differentiable torch operations.
        weight: optional stable form of ``w_f`` as a function of **log u**; checked against autograd.
        minus_f: optional stable form of ``-f`` as a function of **log u**; checked against f.

    Returns:
        The divergence, also found by ``get_divergence(name)`` from now on.

    Raises:
        ValueError: a check failed; the message names the u where it failed.
    """
    if name in _BUILT_IN or name in _FAMILIES:
        raise ValueError(f"{name!r} is built in; choose another name")
    log_u = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    u = log_u.exp()
    values = _call(name, f, u)
    at_one = float(_call(name, f, torch.ones(1, dtype=torch.float64)))
    if not abs(at_one) <= 1e-9:
        raise ValueError(f"divergence {name!r}: f(1) = {at_one:g}, but a divergence needs f(1) = 0; subtract it")
    _refuse_where(~values.isfinite(), u, f"divergence {name!r}: f(u) is not finite")
    slope_at_one = float(_slope(name, f, torch.ones(1, dtype=torch.float64)))
    chords = values.diff() / u.diff()
    rounding = 1e-14 * (values.abs() + u)
    tolerance = (rounding[1:] + rounding[:-1]) / u.diff()
    concave = chords.diff() < -(tolerance[1:] + tolerance[:-1])
    _refuse_where(concave, u[1:-1], f"divergence {name!r}: f is not convex (its slope falls)")
    if bool((chords.diff() <= tolerance[1:] + tolerance[:-1]).all()):
        raise ValueError(f"divergence {name!r}: f is linear, so it is 0 for every pair of distributions")

    sure = _largest_sure_log_u(name, f)

    def by_autograd(log_u: Tensor) -> Tensor:
        bounded = log_u.clamp(max=sure)
        return _of_log(bounded, lambda u: u * _slope(name, f, u) - _call(name, f, u)) - slope_at_one

    def by_calling(log_u: Tensor) -> Tensor:
        return _of_log(log_u, lambda u: -_call(name, f, u))

    centred: Elementwise = by_autograd
    if weight is not None:
        _refuse_mismatch(weight(log_u), by_autograd(log_u) + slope_at_one, u, f"divergence {name!r}: weight(log u)")
        centred = _minus(weight, slope_at_one)
    if minus_f is not None:
        _refuse_mismatch(minus_f(log_u), -values, u, f"divergence {name!r}: minus_f(log u)")
    divergence = Divergence(name, f, slope_at_one, centred, minus_f or by_calling)
    _REGISTERED[name] = divergence
    return divergence


def _minus(function: Elementwise, constant: float) -> Elementwise:
    return lambda log_u: function(log_u) - constant


def _call(name: str, f: Elementwise, u: Tensor) -> Tensor:
    try:
        values = f(u)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"divergence {name!r}: f must take a torch tensor of any shape; it raised: {error}") from error
    if not isinstance(values, Tensor) or values.shape != u.shape:
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"divergence {name!r}: f must be elementwise; a tensor {tuple(u.shape)} gave {got}")
    return values


def _slope(name: str, f: Elementwise, u: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        variable = u.detach().clone().requires_grad_()
        values = _call(name, f, variable)
        if not values.requires_grad:
            raise ValueError(f"divergence {name!r}: autograd finds no way from f(u) back to u; use torch operations")
        (slope,) = torch.autograd.grad(values.sum(), variable)
    return slope


def _largest_sure_log_u(name: str, f: Elementwise) -> float:
    """Up to which log u the rounding error of ``u f'(u) - f(u)`` stays below 1e-6 (relative, above 1)."""
    log_u = torch.linspace(0, 700, 2801, dtype=torch.float64)
    u = log_u.exp()
    grown, value = u * _slope(name, f, u), _call(name, f, u)
    unsure = ~(4e-16 * (grown.abs() + value.abs()) <= 1e-6 * (1 + (grown - value).abs()))
    return float(log_u[max(0, int(unsure.int().argmax()) - 1)]) if bool(unsure.any()) else math.inf


def _of_log(log_u: Tensor, of_u: Elementwise) -> Tensor:
    """``of_u(exp(log_u))`` through float64; at u = 0 its limit, read off at e^-700 and e^-350."""
    device = "cpu" if log_u.device.type == "mps" else log_u.device  # MPS has no float64
    values = of_u(log_u.to(device, torch.float64).clamp(min=-700, max=700).exp())
    if bool((log_u == -math.inf).any()):
        far, near = of_u(torch.tensor([-700.0, -350.0], dtype=torch.float64, device=device).exp()).tolist()
        converged = abs(far - near) <= 1e-6 * max(1.0, abs(far))
        limit = far if converged else math.copysign(math.inf, far)
        values = torch.where(log_u.to(device) == -math.inf, limit, values)
    return values.to(log_u)


def _refuse_where(bad: Tensor, u: Tensor, problem: str) -> None:
    if bool(bad.any()):
        raise ValueError(f"{problem} at u = {float(u[int(bad.int().argmax())]):.6g}")


def _refuse_mismatch(given: Tensor, expected: Tensor, u: Tensor, what: str) -> None:
    _refuse_where(~torch.isclose(given, expected, rtol=1e-6, atol=1e-8), u, f"{what} disagrees with f")
