"""The kit inside verl (tried with 0.9.1), for training beyond one machine: OPD+ advantages, tasks and tools.

verl finds this package by its entry point, ``verl.plugins``, in every process; nothing has to be named. A whole run is
in ``docs/verl.md``. What is registered:

- ``estimators``: distillation losses and advantage estimators, ``MODE_DIVERGENCE``;
- ``agent_loop``: the agent loop ``opd_env``, which plays an example of a task as the kit's own rollouts do;
- ``tools``: ``VerlTool``, for verl's tool configuration.

``examples`` writes the examples of a task as the data file that such a run reads.

Test it alone: ``make test-verl``
"""

from opd_env.plugins.verl.agent_loop import EpisodeLoop
from opd_env.plugins.verl.estimators import distillation_loss, estimator, register_estimators
from opd_env.plugins.verl.tools import VerlTool

__all__ = ["EpisodeLoop", "VerlTool", "distillation_loss", "estimator"]

register_estimators()
