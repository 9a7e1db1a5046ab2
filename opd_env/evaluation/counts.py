"""What finished episodes say about a model: counted per problem, then divided into rates with intervals.

Worked example::

    summary = summarise(trajectories)
    print(summary.accuracy)                                     # 84.0 % [79.1, 88.0]
    table = tally(trajectories)                                 # before anything is divided
    correct_P, episodes_P = fractions(table)["accuracy"]        # one entry per problem

Reports, comparisons and the metrics of a training step all count with ``tally``.

Test it alone: ``pytest tests/evaluation/test_counts.py``
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_env.episode.trajectory import CallRecord, StopReason, Trajectory
from opd_env.evaluation.statistics import Rate, bootstrap_interval, majority_at_k, pass_at_k, rate
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
    """NaN for episodes of a chat server, which tells no tokens."""
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
    """Counts everything in ``Summary``, as ``tally`` counts."""
    table = tally(trajectories)
    sums, n = table.sums, len(table.played)
    rates = {name: rate_of(fraction) for name, fraction in fractions(table).items()}

    def at_k(name: str) -> dict[int, Rate]:
        return {int(key.split("@")[1]): entry for key, entry in rates.items() if key.startswith(f"{name}@")}

    def by(labels: Sequence[Any]) -> dict[Any, Rate]:
        groups = {label: np.array([other == label for other in labels]) for label in sorted(set(labels))}
        return {label: rate(sums["correct"][own], sums["episodes"][own]) for label, own in groups.items()}

    return Summary(
        n=n,
        episodes=int(sums["episodes"].sum()),
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
        calls_per_episode=table.quotient("calls"),
        turns_per_episode=table.quotient("turns"),
        sampled_tokens_per_episode=table.quotient("sampled_tokens", "with_tokens"),
        tokens_per_episode=table.quotient("tokens", "with_tokens"),
        seconds_per_episode=table.quotient("seconds"),
        drift=int(sums["drift"].sum()),
        rows_per_trajectory=table.quotient("rows"),
        **{name: rates[name] for name in RATES},
    )


class Fraction(NamedTuple):
    """A metric before it is divided; shapes ``[problems]``."""

    numerators: NDArray[np.float64]
    denominators: NDArray[np.float64]
    """0 where a problem says nothing about the metric."""


class Played(NamedTuple):
    """One episode of a problem."""

    place: int
    """Its number among all episodes, from 0."""
    sample: int
    correct: bool


@dataclass(frozen=True)
class Tally:
    """Sums per problem. Arrays have shape ``[problems]``."""

    played: Mapping[tuple[str, str], Sequence[Played]]
    """Episodes by task and example id: the problems, in the order in which all arrays have them."""
    questions: Mapping[tuple[str, str], str]
    """What the model was asked, by task and example id."""
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

    def quotient(self, top: str, bottom: str = "episodes") -> float:
        """One sum over another, all problems pooled; NaN where nothing was counted."""
        count = float(self.sums[bottom].sum())
        return float(self.sums[top].sum()) / count if count else math.nan


def tally(trajectories: Iterable[Trajectory]) -> Tally:
    """Adds up finished episodes; reads each trajectory once and keeps none.

    Args:
        trajectories: those of one problem share ``task`` and ``example_id``.
    """
    played: defaultdict[tuple[str, str], list[Played]] = defaultdict(list)
    questions: dict[tuple[str, str], str] = {}
    places: dict[tuple[str, str], int] = {}
    about: list[tuple[int, str]] = []
    sums: list[NDArray[np.float64]] = []
    votes: list[dict[str | None, tuple[int, int]]] = []
    scores: defaultdict[str, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    stops: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    repairs: Counter[str] = Counter()
    for number, one in enumerate(trajectories):
        key = one.task, one.example_id
        played[key].append(Played(number, one.sample, one.correct))
        questions[key] = one.question
        problem = places.setdefault(key, len(places))
        if problem == len(about):
            about.append((one.difficulty, one.category))
            sums.append(np.zeros(len(_COLUMNS)))
            votes.append({})
        counts = _count(one)
        sums[problem] += [counts[name] for name in _COLUMNS]
        given, correct = votes[problem].get(one.extracted, (0, 0))
        votes[problem][one.extracted] = given + 1, correct + one.correct
        for name in one.scores.keys() - {NEEDS_TOOL}:
            scores[name][problem].append(one.scores[name])
        stops[one.stop_reason] += 1
        errors.update(str(call.error) for call in one.calls if call.error is not None)
        repairs.update(repair for call in one.calls for repair in call.repairs)

    def added_up(given: Mapping[int, list[float]]) -> Fraction:
        pairs = [(sum(given[place]), len(given[place])) for place in range(len(sums))]
        return Fraction(*np.array(pairs, dtype=np.float64).T)

    return Tally(
        played=dict(played),
        questions=questions,
        sums=dict(zip(_COLUMNS, np.reshape(sums, (len(sums), len(_COLUMNS))).T, strict=True)),
        scores={name: added_up(scores[name]) for name in sorted(scores)},
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
        played = list(table.played.values())
        for k in powers_of_two(table.samples):
            found[f"pass@{k}"] = _known([pass_at_k(len(ones), sum(one.correct for one in ones), k) for ones in played])
        if any(answer is not None for answers in table.votes for answer in answers):
            for k in powers_of_two(table.samples)[1:]:
                found[f"majority@{k}"] = _known([majority_at_k(answers, k) for answers in table.votes])
    found |= {f"grader/{name}" if name in RATES else name: score for name, score in table.scores.items()}
    return found | {name: Fraction(table.sums[top], table.sums[bottom]) for name, (top, bottom) in RATES.items()}


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4 … and ``samples`` itself; nothing for 0."""
    powers = {2**exponent for exponent in range(samples.bit_length())}
    return sorted(powers | {samples}) if samples else []


def rate_of(fraction: Fraction) -> Rate:
    """As ``rate``, for scores that may lie outside 0 … 1 too."""
    seen = fraction.denominators > 0
    numerators, denominators = fraction.numerators[seen], fraction.denominators[seen]
    if ((numerators >= 0) & (numerators <= denominators)).all():
        return rate(numerators, denominators)
    value = float(numerators.sum() / denominators.sum())
    return Rate(value, *bootstrap_interval(numerators, denominators), len(numerators))


_COLUMNS = (
    "episodes", "correct", "calls", "judged", "parsed", "named", "fitting", "answered", "repeated",
    "called", "malformed", "abstained", "needs_tool", "needs_none", "over_called", "under_called",
    "failed", "recovered", "truncated", "turns", "cut_turns", "with_tokens", "sampled_tokens", "tokens", "seconds",
    "drift", "rows", "retries",
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
        "cut_turns": sum(turn.truncated for turn in trajectory.turns),
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


def _known(values: list[float]) -> Fraction:
    """One value per problem; NaN says nothing."""
    return Fraction(np.nan_to_num(values), (~np.isnan(values)).astype(np.float64))


def _null(value: float) -> float | None:
    """NaN, which JSON has not, as null."""
    return None if isinstance(value, float) and math.isnan(value) else value
