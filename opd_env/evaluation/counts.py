"""What finished episodes add up to, problem by problem: the numbers that every rate and comparison is made of.

Worked example::

    table = tally(trajectories)
    correct_P, episodes_P = fractions(table)["accuracy"]        # one entry per problem

Test it alone: ``pytest tests/evaluation/test_rates.py``
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_env.episode.trajectory import CallRecord, Trajectory
from opd_env.evaluation.statistics import majority_at_k, pass_at_k
from opd_env.formats.base import TokenKind
from opd_env.tools import ToolErrorKind

PARSE_ERRORS = frozenset({ToolErrorKind.UNTERMINATED, ToolErrorKind.INVALID_JSON, ToolErrorKind.NOT_AN_OBJECT})
"""The block could not be read as a call."""
NOT_JUDGED = frozenset({ToolErrorKind.SANDBOX, ToolErrorKind.BUDGET})
"""The call did not run, for a reason outside it: left out of every rate."""
NEEDS_TOOL = "needs_tool"
"""A task that knows whether a problem needs a tool puts 0 or 1 under this name in ``Grade.scores``."""

RATES: Mapping[str, tuple[str, str]] = {
    "accuracy": ("correct", "episodes"),
    "tool_call_validity": ("answered", "judged"),
    "parse_rate": ("parsed", "judged"),
    "name_rate": ("named", "parsed"),
    "argument_rate": ("fitting", "named"),
    "execution_rate": ("answered", "fitting"),
    "called": ("called", "episodes"),
    "malformed": ("malformed", "episodes"),
    "abstained": ("abstained", "episodes"),
    "over_call": ("over_called", "needs_none"),
    "under_call": ("under_called", "needs_tool"),
    "repeated": ("repeated", "parsed"),
    "recovery": ("recovered", "failed"),
    "truncated": ("truncated", "episodes"),
}
"""Rates of ``Summary``, and the two columns of a tally whose quotient each is."""

WORSE_WHEN_HIGHER = frozenset({"malformed", "over_call", "under_call", "repeated", "truncated"})
"""Rates that count mistakes."""
NEITHER_GOOD_NOR_BAD = frozenset({"called", "abstained"})
"""Rates that only describe."""


class Fraction(NamedTuple):
    """A metric before it is divided; shapes ``[problems]``."""

    numerators: NDArray[np.float64]
    denominators: NDArray[np.float64]
    """0 where a problem says nothing about the metric."""


@dataclass(frozen=True)
class Tally:
    """Sums per problem. Arrays have shape ``[problems]``."""

    problems: tuple[tuple[str, str], ...]
    """Task and example id, in the order of first appearance."""
    sums: Mapping[str, NDArray[np.float64]]
    """Counts by the names that ``RATES`` uses, and sizes."""
    scores: Mapping[str, Fraction]
    """Further numbers that the grader gave."""
    votes: tuple[Mapping[str | None, tuple[int, int]], ...]
    """Per problem: how many episodes gave each extracted answer, and how many of those were correct."""
    difficulties: tuple[int, ...]
    categories: tuple[str, ...]
    stop_reasons: Counter[str]
    tool_errors: Counter[str]
    repairs: Counter[str]

    @property
    def samples(self) -> int:
        """k: the most episodes that a problem has."""
        return int(self.sums["episodes"].max(initial=0))


def tally(trajectories: Iterable[Trajectory]) -> Tally:
    """Adds up finished episodes; reads each trajectory once and keeps none.

    Args:
        trajectories: those of one problem share ``task`` and ``example_id``.
    """
    problems: dict[tuple[str, str], int] = {}
    about: list[tuple[int, str]] = []
    votes: list[dict[str | None, tuple[int, int]]] = []
    problem_of: list[int] = []
    rows: list[tuple[float, ...]] = []
    scores: list[Mapping[str, float]] = []
    stops: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    repairs: Counter[str] = Counter()
    for one in trajectories:
        problem = problems.setdefault((one.task, one.example_id), len(problems))
        if problem == len(about):
            about.append((one.difficulty, one.category))
            votes.append({})
        given, correct = votes[problem].get(one.extracted, (0, 0))
        votes[problem][one.extracted] = given + 1, correct + one.correct
        problem_of.append(problem)
        counts = _count(one)
        rows.append(tuple(counts[name] for name in _COLUMNS))
        scores.append(one.scores)
        stops[one.stop_reason] += 1
        errors.update(str(call.error) for call in one.calls if call.error is not None)
        repairs.update(repair for call in one.calls for repair in call.repairs)
    n, problem_E = len(problems), np.array(problem_of, dtype=np.int64)
    columns = np.array(rows, dtype=np.float64).reshape(len(rows), len(_COLUMNS)).T
    return Tally(
        problems=tuple(problems),
        sums={name: _sum_by(problem_E, column_E, n) for name, column_E in zip(_COLUMNS, columns, strict=True)},
        scores=_sum_scores(scores, problem_E, n),
        votes=tuple(votes),
        difficulties=tuple(difficulty for difficulty, _ in about),
        categories=tuple(category for _, category in about),
        stop_reasons=stops,
        tool_errors=errors,
        repairs=repairs,
    )


def fractions(table: Tally) -> dict[str, Fraction]:
    """Every metric before it is divided, in the order in which tables show them.

    Accuracy; with k > 1 also ``pass@1``, ``pass@2``, ``pass@4`` … and ``majority@k`` for the same k, over the problems
    with at least k episodes; the grader's scores; then how tools were called. A score that has the name of a rate
    is called ``grader/NAME``.
    """
    found = {"accuracy": Fraction(table.sums["correct"], table.sums["episodes"])}
    if table.samples > 1:
        for k in powers_of_two(table.samples):
            found[f"pass@{k}"] = _pass(table, k)
        if any(answer is not None for answers in table.votes for answer in answers):
            for k in powers_of_two(table.samples)[1:]:
                found[f"majority@{k}"] = _majority(table, k)
    found |= {f"grader/{name}" if name in RATES else name: score for name, score in table.scores.items()}
    return found | {name: Fraction(table.sums[top], table.sums[bottom]) for name, (top, bottom) in RATES.items()}


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4 … and ``samples`` itself; nothing for 0."""
    powers = {2**exponent for exponent in range(samples.bit_length())}
    return sorted(powers | {samples}) if samples else []


_COLUMNS = (
    "episodes", "correct", "calls", "judged", "parsed", "named", "fitting", "answered", "repeated",
    "called", "malformed", "abstained", "needs_tool", "needs_none", "over_called", "under_called",
    "failed", "recovered", "truncated", "turns", "with_tokens", "sampled_tokens", "tokens", "seconds", "drift", "rows",
    "retries",
)  # fmt: skip


def _count(trajectory: Trajectory) -> dict[str, float]:
    """The numbers of one episode, under the names of ``_COLUMNS``."""
    calls = trajectory.calls
    judged = [call for call in calls if call.error not in NOT_JUDGED]
    parsed = [call for call in judged if call.error not in PARSE_ERRORS]
    named = [call for call in parsed if call.error is not ToolErrorKind.UNKNOWN_TOOL]
    fitting = [call for call in named if call.error is not ToolErrorKind.SCHEMA]
    # A call beyond the budget was read, so it tells whether the episode called; it does not tell how well.
    called = any(call.error not in PARSE_ERRORS for call in calls)
    # A turn that was cut in the middle of a call has call tokens, but no call.
    attempted = bool(calls) or bool((trajectory.kind == TokenKind.TOOL_CALL).any())
    needs = trajectory.scores.get(NEEDS_TOOL)
    failed_turns = [_failed(turn.calls) for turn in trajectory.turns]
    first_failure = failed_turns.index(True) if True in failed_turns else len(failed_turns)
    later = [call for turn in trajectory.turns[first_failure + 1 :] for call in turn.calls]
    return {
        "episodes": 1,
        "correct": trajectory.correct,
        "calls": len(calls),
        "judged": len(judged),
        "parsed": len(parsed),
        "named": len(named),
        "fitting": len(fitting),
        "answered": sum(call.error is None for call in fitting),
        "repeated": len(parsed) - len({_signature(call) for call in parsed}),
        "called": called,
        "malformed": attempted and not called,
        "abstained": not attempted,
        "needs_tool": needs == 1,
        "needs_none": needs == 0,
        "over_called": needs == 0 and attempted,
        "under_called": needs == 1 and not called,
        "failed": True in failed_turns,
        "recovered": any(call.error is None for call in later),
        "truncated": not trajectory.stop_reason.terminated,
        "turns": len(trajectory.turns),
        "with_tokens": len(trajectory.token_ids) > 0,
        "sampled_tokens": trajectory.num_sampled,
        "tokens": len(trajectory.token_ids),
        "seconds": trajectory.seconds,
        "drift": trajectory.drift,
        "rows": len(trajectory.row_starts),
        "retries": sum(call.retries for call in calls),
    }


def _failed(calls: Iterable[CallRecord]) -> bool:
    return any(call.error is not None and call.error not in NOT_JUDGED for call in calls)


def _signature(call: CallRecord) -> tuple[str | None, str]:
    """Equal for calls that differ only in the spacing or key order of their JSON."""
    try:
        return call.name, json.dumps(json.loads(call.arguments), sort_keys=True)
    except ValueError:
        return call.name, call.arguments


def _sum_by(group_E: NDArray[np.int64], column_E: NDArray[np.float64], groups: int) -> NDArray[np.float64]:
    return np.bincount(group_E, weights=column_E, minlength=groups).astype(np.float64)


def _sum_scores(scores: list[Mapping[str, float]], problem_E: NDArray[np.int64], n: int) -> dict[str, Fraction]:
    sums = {}
    for name in sorted({name for entry in scores for name in entry} - {NEEDS_TOOL}):
        has_E = np.array([name in entry for entry in scores])
        values = np.array([entry[name] for entry in scores if name in entry], dtype=np.float64)
        ones = np.ones(len(values))
        sums[name] = Fraction(_sum_by(problem_E[has_E], values, n), _sum_by(problem_E[has_E], ones, n))
    return sums


def _pass(table: Tally, k: int) -> Fraction:
    pairs = zip(table.sums["episodes"], table.sums["correct"], strict=True)
    return _known([pass_at_k(int(episodes), int(correct), k) for episodes, correct in pairs])


def _majority(table: Tally, k: int) -> Fraction:
    return _known([majority_at_k(answers, k) for answers in table.votes])


def _known(values: list[float]) -> Fraction:
    """One value per problem; NaN says nothing."""
    return Fraction(
        np.array([0.0 if math.isnan(value) else value for value in values]),
        np.array([float(not math.isnan(value)) for value in values]),
    )
