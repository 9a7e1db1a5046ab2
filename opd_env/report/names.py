"""What a report calls the numbers of a run, and in which order it shows them.

A metric that is not named here still gets a chart, under "Everything else": nothing that was logged is hidden.

Test it alone: ``pytest tests/report/test_page.py``
"""

from __future__ import annotations

from typing import NamedTuple


class Chart(NamedTuple):
    """How one key of ``metrics.jsonl`` is shown."""

    title: str
    note: str = ""
    percent: bool = False
    """The value is a share."""
    rate: str = ""
    """Rate of ``Summary`` that evaluations and the teacher have of the same."""


CHARTS: dict[str, dict[str, Chart]] = {
    "Learning": {
        "rollout/accuracy": Chart(
            "Accuracy", "Line: training rollouts. Dots: held-out, with 95 % intervals.", True, "accuracy"
        ),
        "rollout/tool_call_validity": Chart(
            "Tool-call validity", "Attempted calls that were answered.", True, "tool_call_validity"
        ),
        "teacher/kl": Chart("KL to the teacher", "On the student's own tokens, in nats per token. It must fall."),
    },
    "Behaviour of the rollouts": {
        "rollout/response_length": Chart("Response length", "Sampled tokens per episode."),
        "rollout/turns": Chart("Turns", "Assistant turns per episode."),
        "rollout/calls": Chart("Tool calls", "Attempted calls per episode."),
        "rollout/malformed_rate": Chart("Only malformed calls", "Episodes whose calls can all not be read.", True),
        "rollout/tool_error_rate": Chart("Failed calls", "Calls that got an error, though they could be read.", True),
        "rollout/truncated_fraction": Chart("Truncated episodes", "Ended by a budget, not by an answer.", True),
    },
    "Optimisation": {
        "train/loss": Chart("Loss", "Its level means nothing for advantage-weighted losses."),
        "train/grad_norm": Chart("Gradient norm", "Before clipping."),
        "train/entropy": Chart("Entropy", "Of the student at sampled tokens, in nats."),
        "train/max_abs_advantage": Chart("Largest |advantage|"),
        "train/clip_fraction": Chart("Clipped tokens", "|log u| beyond clip_log_ratio.", True),
        "train/learning_rate": Chart("Learning rate"),
        "train/logprob_gap": Chart("Sampler–trainer gap", "Mean difference of log-probs; near 0 when both agree."),
    },
    "Speed": {
        "tokens_per_s": Chart("Sampled tokens per second", "Of a whole step."),
        "time/step_s": Chart("Seconds per step"),
    },
}
"""By group and key of ``metrics.jsonl``; ``time/…`` and ``eval/…`` keys that are missing are parts of others."""

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
