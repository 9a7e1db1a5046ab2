"""What a set of finished episodes says about a model: accuracy, tool-call quality, and where episodes end.

Worked example::

    summary = summarise(trajectories)
    print(summary.accuracy)             # 84.0 % [79.1, 88.0]
    summary.to_json()["tool_call_validity"]

Test it alone: ``pytest tests/evaluation/test_rates.py``
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import numpy as np

from opd_env.episode.trajectory import StopReason, Trajectory
from opd_env.evaluation.counts import NEEDS_TOOL, NOT_JUDGED, PARSE_ERRORS, RATES, Fraction, fractions, tally
from opd_env.evaluation.statistics import Rate, bootstrap_interval, rate
from opd_env.tools import ToolErrorKind

__all__ = ["NEEDS_TOOL", "NOT_JUDGED", "PARSE_ERRORS", "Summary", "summarise"]


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
    """NaN for episodes that were played as text, whose tokens nobody counted."""
    tokens_per_episode: float
    """Prompt and tool output included."""
    seconds_per_episode: float
    """Wall time from an episode's first to its last moment; episodes run side by side."""
    drift: int
    """Tokens, over all episodes, that the chat template rewrote: the sum of ``Trajectory.drift``."""
    majority_at_k: Mapping[int, Rate] = field(default_factory=dict)
    """Chance that the answer which most of k episodes gave is correct, for k = 2, 4 … ``samples``."""
    repairs: Mapping[str, int] = field(default_factory=dict)
    """How often each repair made a call readable; empty unless the format was made with ``repair=True``."""
    by_category: Mapping[str, Rate] = field(default_factory=dict)
    """Accuracy per category of problem; one entry, "", where the task has none."""
    rows_per_trajectory: float = 1.0
    """Sequences that an episode was played in; more than 1 where the chat template is not append-only."""
    retries: int = 0
    """How often tools tried a call again by themselves, over all calls."""

    def to_json(self) -> dict[str, Any]:
        """JSON values. A rate ``x`` becomes ``x``, ``x_ci`` = [low, high] and ``x_n``; NaN becomes null."""
        flat: dict[str, Any] = {}
        for name in (entry.name for entry in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Rate):
                numbers = value.to_json()
                flat[name] = numbers["value"]
                flat[f"{name}_ci"] = [numbers["low"], numbers["high"]]
                flat[f"{name}_n"] = numbers["n"]
            elif isinstance(value, Mapping):
                flat[name] = {str(key): one.to_json() if isinstance(one, Rate) else one for key, one in value.items()}
            else:
                flat[name] = _null(value)
        return flat

    @classmethod
    def from_json(cls, flat: Mapping[str, Any]) -> Summary:
        """The inverse of ``to_json``; further keys are ignored."""
        values: dict[str, Any] = {}
        for entry in fields(cls):
            name = entry.name
            if name not in flat and name not in REQUIRED:
                continue
            value = flat[name]
            if entry.type == "Rate":
                low, high = flat[f"{name}_ci"]
                values[name] = Rate.from_json({"value": value, "low": low, "high": high, "n": flat[f"{name}_n"]})
            elif entry.type == "Mapping[int, Rate]":
                values[name] = {int(key): Rate.from_json(one) for key, one in value.items()}
            elif entry.type == "Mapping[str, Rate]":
                values[name] = {key: Rate.from_json(one) for key, one in value.items()}
            else:
                values[name] = math.nan if value is None else value
        return cls(**values)


REQUIRED = frozenset(entry.name for entry in fields(Summary) if entry.default is entry.default_factory is MISSING)
"""What every stored summary has; older ones lack the other fields."""


def summarise(trajectories: Iterable[Trajectory]) -> Summary:
    """Counts everything in ``Summary``; reads each trajectory once and keeps none.

    Args:
        trajectories: finished episodes; those of one problem share ``task`` and ``example_id``.
    """
    table = tally(trajectories)
    sums, n = table.sums, len(table.problems)
    rates = {name: rate_of(fraction) for name, fraction in fractions(table).items()}
    episodes = float(sums["episodes"].sum())

    def mean(name: str, of: str = "episodes") -> float:
        count = float(sums[of].sum())
        return float(sums[name].sum()) / count if count else math.nan

    def at_k(name: str) -> dict[int, Rate]:
        return {int(key.split("@")[1]): entry for key, entry in rates.items() if key.startswith(f"{name}@")}

    def by(labels: Sequence[Any]) -> dict[Any, Rate]:
        groups = {label: np.array([other == label for other in labels]) for label in sorted(set(labels))}
        return {label: rate(sums["correct"][own], sums["episodes"][own]) for label, own in groups.items()}

    return Summary(
        n=n,
        episodes=int(episodes),
        samples=table.samples,
        pass_at_k=at_k("pass") or ({1: rates["accuracy"]} if n else {}),
        majority_at_k=at_k("majority"),
        scores={name: rate_of(score) for name, score in table.scores.items()},
        by_difficulty=by(table.difficulties),
        by_category=by(table.categories),
        stop_reasons={str(reason): table.stop_reasons[reason] for reason in StopReason},
        tool_errors={str(kind): table.tool_errors[kind] for kind in ToolErrorKind},
        repairs=dict(table.repairs),
        calls=int(sums["calls"].sum()),
        retries=int(sums["retries"].sum()),
        calls_per_episode=mean("calls"),
        turns_per_episode=mean("turns"),
        sampled_tokens_per_episode=mean("sampled_tokens", "with_tokens"),
        tokens_per_episode=mean("tokens", "with_tokens"),
        seconds_per_episode=mean("seconds"),
        drift=int(sums["drift"].sum()),
        rows_per_trajectory=mean("rows"),
        **{name: rates[name] for name in RATES},
    )


def rate_of(fraction: Fraction) -> Rate:
    """As ``rate``, for scores that may lie outside 0 … 1 too."""
    seen = fraction.denominators > 0
    numerators, denominators = fraction.numerators[seen], fraction.denominators[seen]
    if ((numerators >= 0) & (numerators <= denominators)).all():
        return rate(numerators, denominators)
    value = float(numerators.sum() / denominators.sum())
    return Rate(value, *bootstrap_interval(numerators, denominators), len(numerators))


def _null(value: float) -> float | None:
    """NaN, which JSON has not, as null."""
    return None if isinstance(value, float) and math.isnan(value) else value
