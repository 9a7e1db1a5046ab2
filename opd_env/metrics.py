"""What a set of finished episodes says about a model: accuracy, tool-call quality, and where episodes end.

Worked example::

    summary = summarise(trajectories)
    print(summary.accuracy)             # 84.0 % [79.1, 88.0]
    summary.to_json()["tool_call_validity"]

Test it alone: ``pytest tests/core/test_metrics.py``
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_env.statistics import Rate, bootstrap_interval, pass_at_k, rate
from opd_env.tools import ToolErrorKind
from opd_env.trajectory import CallRecord, StopReason, TokenKind, Trajectory

PARSE_ERRORS = frozenset({ToolErrorKind.UNTERMINATED, ToolErrorKind.INVALID_JSON, ToolErrorKind.NOT_AN_OBJECT})
"""The block could not be read as a call."""
NOT_JUDGED = frozenset({ToolErrorKind.SANDBOX, ToolErrorKind.BUDGET})
"""The call did not run, for a reason outside it: left out of every rate."""
NEEDS_TOOL = "needs_tool"
"""A task that knows whether a problem needs a tool puts 0 or 1 under this name in ``Grade.scores``."""


@dataclass(frozen=True)
class Summary:
    """Numbers of one model on one task. Every ``Rate`` has a 95 % interval clustered by problem.

    The four stages of a call are rates among the calls that passed the stage before, so that each names its
    own weakness and their product is ``tool_call_validity``.
    """

    n: int
    """Problems."""
    episodes: int
    samples: int
    """k: the most episodes that a problem has."""
    accuracy: Rate
    """Share of episodes that are correct; with k episodes per problem this is avg@k."""
    pass_at_k: Mapping[int, Rate]
    """Unbiased pass@k for k = 1, 2, 4 … ``samples``, over the problems with at least k episodes."""
    tool_call_validity: Rate
    """Share of attempted calls that could be read, named a known tool, fitted its schema, and that the tool
    answered. Unreadable blocks count as attempts. A time-out, an oversized answer or an exception of the tool
    counts against the call; a failed sandbox or a spent budget leaves it out."""
    parse_rate: Rate
    """Attempted calls that could be read as a call."""
    name_rate: Rate
    """Readable calls that named a tool the episode has."""
    argument_rate: Rate
    """Calls of known tools whose arguments fit the schema."""
    execution_rate: Rate
    """Calls with fitting arguments that the tool answered."""
    called: Rate
    """Episodes with at least one readable call. ``called``, ``malformed`` and ``abstained`` add up to 1."""
    malformed: Rate
    """Episodes that attempted calls, none of them readable; a call that a length limit cut is such an attempt."""
    abstained: Rate
    """Episodes that attempted no call."""
    over_call: Rate
    """Episodes that attempted a call although the problem needs no tool (where the task says so)."""
    under_call: Rate
    """Episodes without a readable call although the problem needs a tool (where the task says so)."""
    repeated: Rate
    """Readable calls with the name and arguments of an earlier call of their episode."""
    recovery: Rate
    """Episodes with a failed call in which a call of a later turn was answered."""
    truncated: Rate
    """Episodes that a budget ended."""
    scores: Mapping[str, Rate]
    """Mean of every further number that the grader gave."""
    by_difficulty: Mapping[int, Rate]
    """Accuracy per difficulty level."""
    stop_reasons: Mapping[str, int]
    """Episodes per ``StopReason``, all of them listed."""
    tool_errors: Mapping[str, int]
    """Calls per ``ToolErrorKind``, all of them listed, those that are not judged too."""
    calls: int
    """Attempted calls."""
    calls_per_episode: float
    turns_per_episode: float
    sampled_tokens_per_episode: float
    tokens_per_episode: float
    """Prompt and tool output included."""
    seconds_per_episode: float
    """Wall time from an episode's first to its last moment; episodes run side by side."""
    drift: int
    """Tokens, over all episodes, that differ when the finished conversation is rendered anew."""

    def to_json(self) -> dict[str, Any]:
        """JSON values. A rate ``x`` becomes ``x``, ``x_ci`` = [low, high] and ``x_n``; NaN becomes null."""
        flat: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Rate):
                entry = value.to_json()
                flat[field.name] = entry["value"]
                flat[f"{field.name}_ci"] = [entry["low"], entry["high"]]
                flat[f"{field.name}_n"] = entry["n"]
            elif isinstance(value, Mapping):
                flat[field.name] = {
                    str(key): entry.to_json() if isinstance(entry, Rate) else entry for key, entry in value.items()
                }
            else:
                flat[field.name] = _null(value)
        return flat

    @classmethod
    def from_json(cls, flat: Mapping[str, Any]) -> Summary:
        """The inverse of ``to_json``; further keys are ignored."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = flat[field.name]
            if field.type == "Rate":
                low, high = flat[f"{field.name}_ci"]
                entry = {"value": value, "low": low, "high": high, "n": flat[f"{field.name}_n"]}
                values[field.name] = Rate.from_json(entry)
            elif field.type == "Mapping[int, Rate]":
                values[field.name] = {int(key): Rate.from_json(entry) for key, entry in value.items()}
            elif field.type == "Mapping[str, Rate]":
                values[field.name] = {key: Rate.from_json(entry) for key, entry in value.items()}
            else:
                values[field.name] = math.nan if value is None else value
        return cls(**values)


def summarise(trajectories: Iterable[Trajectory]) -> Summary:
    """Counts everything in ``Summary``; reads each trajectory once and keeps none.

    Args:
        trajectories: finished episodes; those of one problem share ``task`` and ``example_id``.
    """
    problems: dict[tuple[str, str], int] = {}
    problem_of: list[int] = []
    counts: list[dict[str, float]] = []
    scores: list[Mapping[str, float]] = []
    levels: dict[int, int] = {}
    stops: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for trajectory in trajectories:
        problem = problems.setdefault((trajectory.task, trajectory.example_id), len(problems))
        problem_of.append(problem)
        levels[problem] = trajectory.difficulty
        counts.append(_count(trajectory))
        scores.append(trajectory.scores)
        stops[trajectory.stop_reason] += 1
        errors.update(str(call.error) for call in trajectory.calls if call.error is not None)

    n, problem_E = len(problems), np.array(problem_of, dtype=np.int64)
    columns_E = {name: np.array([count[name] for count in counts], dtype=np.float64) for name in _COLUMNS}
    columns_P = {name: _sum_by(problem_E, column, n) for name, column in columns_E.items()}
    episodes_P, correct_P = columns_P["episodes"], columns_P["correct"]
    samples = int(episodes_P.max(initial=0))

    def share(successes: str, trials: str) -> Rate:
        return rate(columns_P[successes], columns_P[trials])

    def mean(name: str) -> float:
        return float(columns_E[name].mean()) if counts else math.nan

    level_P = np.array([levels[problem] for problem in range(n)], dtype=np.int64)
    return Summary(
        n=n,
        episodes=len(counts),
        samples=samples,
        accuracy=share("correct", "episodes"),
        pass_at_k={k: _pass_rate(episodes_P, correct_P, k) for k in _powers_of_two(samples)},
        tool_call_validity=share("answered", "judged"),
        parse_rate=share("parsed", "judged"),
        name_rate=share("named", "parsed"),
        argument_rate=share("fitting", "named"),
        execution_rate=share("answered", "fitting"),
        called=share("called", "episodes"),
        malformed=share("malformed", "episodes"),
        abstained=share("abstained", "episodes"),
        over_call=share("over_called", "needs_none"),
        under_call=share("under_called", "needs_tool"),
        repeated=share("repeated", "parsed"),
        recovery=share("recovered", "failed"),
        truncated=share("truncated", "episodes"),
        scores=_score_rates(scores, problem_E, n),
        by_difficulty={
            int(level): rate(correct_P[level_P == level], episodes_P[level_P == level]) for level in np.unique(level_P)
        },
        stop_reasons={str(reason): stops[reason] for reason in StopReason},
        tool_errors={str(kind): errors[kind] for kind in ToolErrorKind},
        calls=int(columns_E["calls"].sum()),
        calls_per_episode=mean("calls"),
        turns_per_episode=mean("turns"),
        sampled_tokens_per_episode=mean("sampled_tokens"),
        tokens_per_episode=mean("tokens"),
        seconds_per_episode=mean("seconds"),
        drift=int(columns_E["drift"].sum()),
    )


_COLUMNS = (
    "episodes", "correct", "calls", "judged", "parsed", "named", "fitting", "answered", "repeated",
    "called", "malformed", "abstained", "needs_tool", "needs_none", "over_called", "under_called",
    "failed", "recovered", "truncated", "turns", "sampled_tokens", "tokens", "seconds", "drift",
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
        "sampled_tokens": trajectory.num_sampled,
        "tokens": len(trajectory.token_ids),
        "seconds": trajectory.seconds,
        "drift": trajectory.drift,
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


def _powers_of_two(samples: int) -> list[int]:
    """1, 2, 4 … and ``samples`` itself; nothing for 0."""
    powers = {2**exponent for exponent in range(samples.bit_length())}
    return sorted(powers | {samples}) if samples else []


def _pass_rate(episodes_P: NDArray[np.float64], correct_P: NDArray[np.float64], k: int) -> Rate:
    estimates = [pass_at_k(int(n), int(c), k) for n, c in zip(episodes_P, correct_P, strict=True)]
    return rate([estimate for estimate in estimates if not math.isnan(estimate)])


def _score_rates(scores: list[Mapping[str, float]], problem_E: NDArray[np.int64], n: int) -> dict[str, Rate]:
    names = sorted({name for entry in scores for name in entry} - {NEEDS_TOOL})
    rates = {}
    for name in names:
        has = np.array([name in entry for entry in scores])
        values = np.array([entry[name] for entry in scores if name in entry], dtype=np.float64)
        total_P, count_P = (
            _sum_by(problem_E[has], values, n),
            _sum_by(problem_E[has], np.ones(len(values)), n),
        )
        rates[name] = _mean(total_P[count_P > 0], count_P[count_P > 0])
    return rates


def _mean(totals_P: NDArray[np.float64], counts_P: NDArray[np.float64]) -> Rate:
    """As ``rate``, for scores that may lie outside 0 … 1."""
    if ((totals_P >= 0) & (totals_P <= counts_P)).all():
        return rate(totals_P, counts_P)
    value = float(totals_P.sum() / counts_P.sum())
    return Rate(value, *bootstrap_interval(totals_P, counts_P), len(totals_P))


def _null(value: float) -> float | None:
    """NaN, which JSON has not, as null."""
    return None if isinstance(value, float) and math.isnan(value) else value
