"""What a run did, in a few plain sentences: the head of its report and the end of its command.

Worked example::

    headline(Run.read("runs/demo"))
    # Greedy accuracy on 400 held-out problems went from 33.0 % to 97.5 %; the 95 % intervals do not overlap. …

Test it alone: ``pytest tests/report/test_headline.py``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opd_env.evaluation.read_run import Run
from opd_env.evaluation.statistics import compare_paired


def headline(run: Run) -> str:
    """One paragraph; empty for the folder of an evaluation."""
    before, after = (run.models.get(key) for key in ("before", "after"))
    if before is None or after is None:
        return "" if "evaluation" in run.models else "This run has not finished; this is how far it came."
    greedy = run.setting("evaluation.temperature") == 0
    overlap = "overlap" if before.accuracy.overlaps(after.accuracy) else "do not overlap"
    text = (
        f"{'Greedy accuracy' if greedy else 'Accuracy'} on {after.accuracy.n} held-out problems went from"
        f" {percent(before.accuracy.value)} to {percent(after.accuracy.value)}; the 95 % intervals {overlap}."
    )
    first, second = before.scores, after.scores
    both = [key for key in first if key in second]
    if both:
        paired = compare_paired([first[key] for key in both], [second[key] for key in both])
        text += f" Problem by problem, {paired.gained} were gained and {paired.lost} lost (p = {paired.p_value:.1g})."
        if paired.lost > paired.gained and paired.p_value < 0.05:
            text += f" The student got worse{_divergence_rose(run.metrics)}."
    alone = [teacher.accuracy.value for teacher in run.teachers]
    if len(alone) > 1:
        each = " and ".join(map(percent, alone))
        text += (
            f" Its teacher is a mixture, {run.teacher}, whose members reach {each} alone; it plays no episodes itself."
        )
    elif alone and alone[0] > before.accuracy.value:
        share = after.accuracy.value / alone[0]
        text += f" The student reaches {100 * share:.0f} % of its teacher's {percent(alone[0])}."
    elif alone:
        text += f" Its {no_better(alone[0], before.accuracy.value)}."
    return text


def no_better(teacher: float, student: float) -> str:
    """What there is to say of a teacher whose accuracy is not above that of the student before training."""
    return (
        f"teacher, with {percent(teacher)} of the held-out problems, is no better than the student before training, "
        f"with {percent(student)}: it may have nothing to teach on this task"
    )


def percent(value: float) -> str:
    """A share as text."""
    return f"{100 * value:.1f} %"


def _divergence_rose(metrics: Sequence[Mapping[str, Any]]) -> str:
    """What to look at when the student left its teacher: means of the first and the last tenth of the steps."""
    values = [value for row in metrics if isinstance(value := row.get("teacher/kl"), int | float)]
    tenth = max(1, len(values) // 10)
    if len(values) < 2 or (last := sum(values[-tenth:]) / tenth) <= (first := sum(values[:tenth]) / tenth):
        return ""
    return (
        f", and its KL to the teacher rose from {first:.3g} to {last:.3g} nats per token: a lower learning_rate is the "
        "first thing to try"
    )
