"""Runs: a whole training, from settings to results, that can be killed at any moment and continued.

What it is: the loop, its settings and parts, rollouts of a step, evaluation of a stage, the folder, checkpoints,
metrics, and how several processes stay together.
Stands on: everything below it.
Read first: ``loop``.
Who may change it: with the crash tests (``tests/trainer/run/test_crash_safety.py``); processes are sealed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_env._lazy import lazy_face

if TYPE_CHECKING:
    from opd_env.trainer.run.config import OPDConfig as OPDConfig
    from opd_env.trainer.run.config import load_config as load_config
    from opd_env.trainer.run.loop import OPDTrainer as OPDTrainer

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "config": ("OPDConfig", "load_config"),
        "loop": ("OPDTrainer",),
    },
)
