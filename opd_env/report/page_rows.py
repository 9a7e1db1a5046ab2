"""What a report calls the numbers of a run, and in which order it shows them.

A metric that is not named here still gets a chart, under "Everything else": nothing that was logged is hidden.

Test it alone: ``pytest tests/report/test_page.py``
"""

from __future__ import annotations

from typing import NamedTuple


class Chart(NamedTuple):
    """How one key of ``metrics.jsonl`` is shown."""

    title: str
    group: str
    percent: bool
    """The value is a share."""
    note: str
    summary_field: str = ""
    """Rate of ``Summary`` that evaluations and the teacher have of the same."""


CHART_GROUPS = ("Learning", "Behaviour of the rollouts", "Optimisation", "Speed", "Everything else")

CHARTS: dict[str, Chart] = {
    "rollout/accuracy": Chart(
        "Accuracy",
        "Learning",
        True,
        "Line: training rollouts. Dots: held-out, with 95 % intervals.",
        "accuracy",
    ),
    "rollout/tool_call_validity": Chart(
        "Tool-call validity", "Learning", True, "Attempted calls that were answered.", "tool_call_validity"
    ),
    "teacher/kl": Chart(
        "KL to the teacher", "Learning", False, "On the student's own tokens, in nats per token. It must fall."
    ),
    "rollout/response_length": Chart(
        "Response length", "Behaviour of the rollouts", False, "Sampled tokens per episode."
    ),
    "rollout/turns": Chart("Turns", "Behaviour of the rollouts", False, "Assistant turns per episode."),
    "rollout/calls": Chart("Tool calls", "Behaviour of the rollouts", False, "Attempted calls per episode."),
    "rollout/malformed_rate": Chart(
        "Only malformed calls", "Behaviour of the rollouts", True, "Episodes whose calls can all not be read."
    ),
    "rollout/tool_error_rate": Chart(
        "Failed calls", "Behaviour of the rollouts", True, "Readable calls that got an error instead of an answer."
    ),
    "rollout/truncated_fraction": Chart(
        "Truncated episodes", "Behaviour of the rollouts", True, "Ended by a budget, not by an answer."
    ),
    "train/loss": Chart("Loss", "Optimisation", False, "Its level means nothing for advantage-weighted losses."),
    "train/grad_norm": Chart("Gradient norm", "Optimisation", False, "Before clipping."),
    "train/entropy": Chart("Entropy", "Optimisation", False, "Of the student at sampled tokens, in nats."),
    "train/max_abs_advantage": Chart("Largest |advantage|", "Optimisation", False, ""),
    "train/clip_fraction": Chart("Clipped tokens", "Optimisation", True, "|log u| beyond clip_log_ratio."),
    "train/learning_rate": Chart("Learning rate", "Optimisation", False, ""),
    "train/logprob_gap": Chart(
        "Sampler–trainer gap", "Optimisation", False, "Mean difference of log-probs; near 0 when both agree."
    ),
    "tokens_per_s": Chart("Sampled tokens per second", "Speed", False, "Of a whole step."),
    "time/step_s": Chart("Seconds per step", "Speed", False, ""),
}
"""By key of ``metrics.jsonl``; ``time/…`` and ``eval/…`` keys that are not here are part of other pictures."""

PHASES = {"time/rollout_s": "Rollouts", "time/teacher_s": "Teacher", "time/update_s": "Update"}
"""Phases that follow each other within a step; tools run inside the rollouts."""

BEHAVIOUR: dict[str, tuple[str, str]] = {
    "accuracy": ("Accuracy", "correct final answers"),
    "tool_call_validity": ("Tool-call validity", "attempted calls that were answered"),
    "parse_rate": ("… could be read", "of attempted calls"),
    "name_rate": ("… named a known tool", "of readable calls"),
    "argument_rate": ("… fitted its schema", "of calls of known tools"),
    "execution_rate": ("… were answered", "of calls with fitting arguments"),
    "called": ("Called a tool", "episodes with a readable call"),
    "malformed": ("Only malformed calls", "episodes"),
    "abstained": ("Called nothing", "episodes"),
    "over_call": ("Over-calls", "episodes that need no tool"),
    "under_call": ("Under-calls", "episodes that need a tool"),
    "repeated": ("Repeated calls", "of readable calls"),
    "recovery": ("Recovered", "episodes with a failed call"),
    "truncated": ("Truncated", "episodes ended by a budget"),
}
"""Rates of ``Summary``: title and what the share is of."""
