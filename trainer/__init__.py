"""How a student learns: divergences, advantages, the loss, teachers and the training loop.

Names load on first use, so that ``import opd_env.trainer`` does not import torch::

    from opd_env.trainer import OPDConfig, OPDTrainer

    OPDTrainer(OPDConfig(student="packaged:student", teacher="packaged:teacher", task="arithmetic")).train()

Test it alone: ``pytest tests/trainer``
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd_env.trainer.advantages import advantage
    from opd_env.trainer.config import OPDConfig
    from opd_env.trainer.divergences import get_divergence, register_divergence
    from opd_env.trainer.loop import OPDTrainer
    from opd_env.trainer.loss import policy_loss

__all__ = ["OPDConfig", "OPDTrainer", "advantage", "get_divergence", "policy_loss", "register_divergence"]

_HOMES = {
    "OPDConfig": "config",
    "OPDTrainer": "loop",
    "advantage": "advantages",
    "get_divergence": "divergences",
    "policy_loss": "loss",
    "register_divergence": "divergences",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
