"""The choices that name an estimate of the gradient; without torch, for settings and ``--help``.

Worked example::

    >>> Mode("opd_plus") is Mode.OPD_PLUS, str(Estimator.FULL)
    (True, 'full')

Test it alone: ``pytest tests/trainer/math/test_advantages.py``
"""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """Weight on the gradient of a token's log-prob; u = teacher probability / student probability."""

    OPD = "opd"
    """-f(u): stop-gradient, biased for every divergence but reverse KL."""
    OPD_PLUS = "opd_plus"
    """-f(u) + u f'(u): the exact gradient of the divergence (arXiv 2606.01039)."""
    OPD_PLUS_CENTRED = "opd_plus_centred"
    """OPD+ minus its value at agreement: the same expected gradient with less variance."""


class Estimator(StrEnum):
    """What of the teacher's distribution is used at each sampled token."""

    SAMPLED = "sampled"
    """The log-prob of the sampled token: all that a remote teacher must give."""
    FULL = "full"
    """The sum over the whole vocabulary: no sampling noise, needs a local teacher."""
    TOPK = "topk"
    """The sum over the teacher's most likely tokens and one bucket for the rest: a coarser divergence, exactly."""


class Baseline(StrEnum):
    """What is subtracted from a sampled token's OPD+ weight; it changes the noise, not the expected gradient."""

    NONE = "none"
    """Nothing but the mode's own constant."""
    VALUE = "value"
    """E_p[w_f(u)] at the prefix (vOPD, arXiv 2605.07865): from full logits, or from the teacher's top k."""


class RatioPolicy(StrEnum):
    """Which student the teacher is compared with in u."""

    ROLLOUT = "rollout"
    """The student that sampled (the paper)."""
    CURRENT = "current"
    """The student as it is at this update: better when updates are many per rollout."""
