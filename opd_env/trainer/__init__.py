"""How a student learns: divergences, advantages, the loss, teachers and the training loop.

Names load on first use, so that ``import opd_env.trainer`` does not import torch::

    from opd_env.trainer import OPDTrainer, load_config

    OPDTrainer(load_config(["configs/demo.yaml"])).train()

Four rooms, lowest first: ``math`` (pure), ``teachers``, ``learn``, ``run``. ``batch`` is what teachers and learners
both read: the rows of an episode, padded into micro-batches.

Test it alone: ``pytest tests/trainer``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_env._lazy import lazy_face

if TYPE_CHECKING:
    from opd_env.trainer.math.advantages import advantage as advantage
    from opd_env.trainer.math.divergences import get_divergence as get_divergence
    from opd_env.trainer.math.divergences import register_divergence as register_divergence
    from opd_env.trainer.math.loss import policy_loss as policy_loss
    from opd_env.trainer.run.config import OPDConfig as OPDConfig
    from opd_env.trainer.run.config import load_config as load_config
    from opd_env.trainer.run.loop import OPDTrainer as OPDTrainer

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "math.advantages": ("advantage",),
        "math.divergences": ("get_divergence", "register_divergence"),
        "math.loss": ("policy_loss",),
        "run.config": ("OPDConfig", "load_config"),
        "run.loop": ("OPDTrainer",),
    },
)
