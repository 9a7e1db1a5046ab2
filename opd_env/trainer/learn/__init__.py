"""Learning: from trajectories and teacher scores to one optimiser step.

What it is: the objective of a micro-batch, what the teacher says of its tokens, weights of tokens, the update, and
several processes.
Stands on: ``trainer.math``, ``trainer.teachers``, ``trainer.batch``.
Read first: ``objective``, then ``update``.
Who may change it: with an enumeration or invariance test (padding, micro-batches, processes change nothing).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_env._lazy import lazy_face

if TYPE_CHECKING:
    from opd_env.trainer.learn.objective import OPDObjective as OPDObjective
    from opd_env.trainer.learn.update import Updater as Updater

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "objective": ("OPDObjective",),
        "update": ("Updater",),
    },
)
