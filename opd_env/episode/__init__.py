"""Episodes: a student, a task and tools, turn by turn, down to exact token ids and masks.

What it is: the Gymnasium environment (text in, text out), its limits, how one episode is played and recorded as
tokens, many of them at once, and how they are stored.
Stands on: ``tools``, ``tasks``, ``formats`` and ``engines.base``.
Read first: ``env``, then ``play`` (one episode in fifty lines), then ``record`` and ``trajectory``.
Who may change it: with a mask test only: a token that is scored wrongly trains happily and ruins a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_env._lazy import lazy_face

if TYPE_CHECKING:
    from opd_env.episode.env import ToolEnv as ToolEnv
    from opd_env.episode.limits import RolloutLimits as RolloutLimits
    from opd_env.episode.rollouts import RolloutResult as RolloutResult
    from opd_env.episode.rollouts import rollout as rollout
    from opd_env.episode.store import load_trajectories as load_trajectories
    from opd_env.episode.store import save_trajectories as save_trajectories
    from opd_env.episode.trajectory import CallRecord as CallRecord
    from opd_env.episode.trajectory import StopReason as StopReason
    from opd_env.episode.trajectory import Trajectory as Trajectory
    from opd_env.episode.trajectory import TurnRecord as TurnRecord

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "env": ("ToolEnv",),
        "limits": ("RolloutLimits",),
        "rollouts": ("RolloutResult", "rollout"),
        "store": ("load_trajectories", "save_trajectories"),
        "trajectory": ("CallRecord", "StopReason", "Trajectory", "TurnRecord"),
    },
)
