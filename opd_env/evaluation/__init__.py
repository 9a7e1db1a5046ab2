"""Evaluation: what a model scores on a task, with intervals, and how two models compare.

What it is: one run over a task's problems, counts of what happened and their rates, intervals and differences,
comparisons of stored evaluations, and a player for chat servers.
Stands on: ``episode``; ``statistics`` and ``counts`` are mathematics without models or files.
Read first: ``run``, then ``counts``. Training counts its rollouts with ``counts`` too.
Who may change it: anyone, with a second way of counting as the test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_env._lazy import lazy_face

if TYPE_CHECKING:
    from opd_env.evaluation.comparison import Comparison as Comparison
    from opd_env.evaluation.comparison import compare as compare
    from opd_env.evaluation.comparison import read_side as read_side
    from opd_env.evaluation.result import EvaluationResult as EvaluationResult
    from opd_env.evaluation.run import evaluate as evaluate
    from opd_env.evaluation.statistics import Rate as Rate
    from opd_env.evaluation.statistics import bootstrap_interval as bootstrap_interval
    from opd_env.evaluation.statistics import pass_at_k as pass_at_k
    from opd_env.evaluation.statistics import wilson as wilson

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "comparison": ("Comparison", "compare", "read_side"),
        "result": ("EvaluationResult",),
        "run": ("evaluate",),
        "statistics": ("Rate", "bootstrap_interval", "pass_at_k", "wilson"),
    },
)
