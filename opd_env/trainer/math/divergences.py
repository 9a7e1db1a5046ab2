"""Divergences by name, and how to add one's own.

Worked example::

    >>> get_divergence("forward_kl").weight(torch.tensor(0.0))              # w_f(u) = u
    tensor(1.)
    >>> mine = register_divergence("mine", lambda u: (u - 1) ** 2 / (u + 1))   # triangular discrimination
    >>> get_divergence("mine").weight(torch.tensor(1.0))                    # u f'(u) - f(u), f' by autograd
    tensor(1.1378)

Test it alone: ``pytest tests/trainer/math/test_divergences.py``
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from opd_env.errors import unknown
from opd_env.trainer.math.formulas import (
    FORWARD_KL,
    HELLINGER,
    JEFFREYS,
    JSD,
    NEYMAN_CHI2,
    PEARSON_CHI2,
    REVERSE_KL,
    TOTAL_VARIATION,
    Divergence,
    Elementwise,
    alpha,
    skew_jsd,
)

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
