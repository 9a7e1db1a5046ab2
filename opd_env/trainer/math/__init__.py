"""The mathematics of OPD+: divergences, advantages, the loss, and the proof that they are right.

What it is: f-divergences and their weights, the three advantages, log-probs that never hold
``[batch, length, vocab]``, the loss, and ``certify``, which compares every option with autograd's exact gradient.
Stands on: torch. No model, no file, no settings.
Read first: ``divergences``, then ``advantages``, ``loss``.
Who may change it: with a proof only: ``opd-env certify`` and ``pytest tests/trainer/math``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_env._lazy import lazy_face

if TYPE_CHECKING:
    from opd_env.trainer.math.advantages import advantage as advantage
    from opd_env.trainer.math.divergences import Divergence as Divergence
    from opd_env.trainer.math.divergences import get_divergence as get_divergence
    from opd_env.trainer.math.divergences import register_divergence as register_divergence
    from opd_env.trainer.math.loss import policy_loss as policy_loss

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "advantages": ("advantage",),
        "divergences": ("Divergence", "get_divergence", "register_divergence"),
        "loss": ("policy_loss",),
    },
)
