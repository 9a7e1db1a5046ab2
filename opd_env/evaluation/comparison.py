"""Compares evaluations problem by problem: the difference of every metric, and the problems whose outcome flipped.

Worked example::

    first, second = read_side("runs/before"), read_side("runs/after")
    comparison = compare(first, second)
    print(comparison.accuracy)              # +12.0 points [+4.1, +19.9], 15 gained, 3 lost, p = 0.0075
    comparison.gained[0].question

Pairing is sharper than looking whether two intervals overlap: problems that both models solve, or neither, cancel.
It needs the same problems under the same words, so evaluations of other prompts, tools or task versions are refused.

Test it alone: ``pytest tests/evaluation/test_comparison.py``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from opd_env.episode.store import load_written
from opd_env.episode.trajectory import Decode, Trajectory
from opd_env.errors import UserError
from opd_env.evaluation.counts import Fraction, Summary, Tally, fractions, rate_of, tally
from opd_env.evaluation.read_run import Run, read_json, tokenizer_of
from opd_env.evaluation.statistics import Difference, PairedDifference, Rate, compare_paired, difference_of_shares

MUST_AGREE = ("task", "version", "split", "tools", "prompt_hash")
"""Settings without which two scores answer different questions."""

_RESULTS = "results.json"


class NotComparable(UserError):
    """Evaluations that cannot be compared; the message says which, what differs, and what to do."""


@dataclass(frozen=True)
class Side:
    """One evaluation: of a model, on a task."""

    name: str
    """What it is called beside the others."""
    path: str
    """Where it is stored."""
    settings: Mapping[str, Any]
    """See ``EvaluationResult``."""
    versions: Mapping[str, str]
    label: str
    """Task and tools."""
    trajectories: Sequence[Trajectory]
    finished: float = 0.0
    """When its results were written, in seconds since 1970."""
    curve: Sequence[tuple[float, Summary]] = ()
    """Evaluations of the same run by step, when it comes from one."""
    decode: Decode | None = None
    """Text of token ids; None when no tokenizer is stored."""

    @cached_property
    def table(self) -> Tally:
        """All episodes, added up; reads each once."""
        return tally(self.trajectories)


@dataclass(frozen=True)
class MetricDifference:
    """One metric of both sides on their common problems."""

    name: str
    first: Rate
    second: Rate
    difference: Difference


@dataclass(frozen=True)
class Flip:
    """A problem on which the sides differ, with an episode of each that shows it."""

    example_id: str
    question: str
    first: int
    """Place in the first side's trajectories."""
    second: int


@dataclass(frozen=True)
class Comparison:
    """Two sides on the problems that both have played."""

    first: Side
    second: Side
    accuracy: PairedDifference
    """With McNemar's exact test; with several episodes per problem, a sign test on their means."""
    metrics: tuple[MetricDifference, ...]
    """Every metric that was observed on both sides."""
    gained: tuple[Flip, ...]
    """Problems on which the second is better."""
    lost: tuple[Flip, ...]
    single: bool
    """Both played one episode per problem."""
    notes: tuple[str, ...]
    """What else differs between the two evaluations: one sentence each."""


def read_side(path: str | Path, *, name: str = "") -> Side:
    """Opens an evaluation.

    Args:
        path: the folder of an evaluation (``runs/eval/MODEL/TASK``, ``runs/demo/evaluations/before``), its
            ``results.json``, or a run folder, of which the last evaluation is taken.
        name: what to call it; by default its path.

    Raises:
        NotComparable: there is no evaluation, or its episodes were not stored.
        ValueError: a file is damaged.
    """
    path = Path(path)
    folder = path.parent if path.name == _RESULTS else path
    curve: Sequence[tuple[float, Summary]] = ()
    evaluations = sorted((folder / "evaluations").glob(f"*/{_RESULTS}"))
    place = folder
    if evaluations:
        curve = (
            Run.read(folder).evaluated if (folder / _RESULTS).exists() or (folder / "metrics.jsonl").exists() else ()
        )
        by_name = {file.parent.name: file.parent for file in evaluations}
        place = by_name.get("after") or by_name[max(by_name, key=_progress)]
    stored = read_json(place / _RESULTS).get("evaluation", {})
    if not stored:
        inner = sorted(str(file.parent) for file in folder.glob(f"*/{_RESULTS}"))
        if inner:
            raise NotComparable(f"{path} holds {len(inner)} evaluations; name one of them: {', '.join(inner)}")
        raise NotComparable(
            f"{path} holds no evaluation; give a folder that opd-env eval or opd-env train wrote, or its {_RESULTS}"
        )
    if "settings" not in stored:
        raise NotComparable(f"{place / _RESULTS} does not say how it was played (no settings); evaluate again")
    trajectories = load_written(place, "trajectories")
    if trajectories is None:
        raise NotComparable(f"{place} holds no trajectories beside its results, so its problems cannot be paired")
    home = place.parent.parent if place.parent.name == "evaluations" else place
    given = str(place if home == place else home)
    return Side(
        name=name or (given if home == place else f"{given} ({_title(place.name)})"),
        path=str(place),
        settings=stored["settings"],
        versions=stored.get("versions", {}),
        label=stored.get("label", ""),
        trajectories=trajectories,
        finished=(place / _RESULTS).stat().st_mtime,
        curve=curve,
        decode=tokenizer_of(home),
    )


def named_by_model(sides: Sequence[Side]) -> list[Side]:
    """The same sides, called by their models if all of these differ."""
    models = [str(side.settings.get("model", "")) for side in sides]
    if "" in models or len(set(models)) < len(models):
        return list(sides)
    return [replace(side, name=model) for side, model in zip(sides, models, strict=True)]


def compare(first: Side, second: Side) -> Comparison:
    """Pairs two evaluations by problem.

    Raises:
        NotComparable: they differ in one of ``MUST_AGREE``, in a question, or have no problem in common.
    """
    for name in MUST_AGREE:
        one, other = first.settings.get(name), second.settings.get(name)
        if one != other:
            _refuse(first, second, f"{name.replace('_', ' ')} is {one!r} in the first and {other!r} in the second")
    common = [key for key in first.table.played if key in second.table.played]
    if not common:
        _refuse(first, second, "they have no problem in common")
    for key in common:
        one, other = first.table.questions[key], second.table.questions[key]
        if one != other:
            asked = f"{one[:80]!r} in the first and {other[:80]!r} in the second"
            _refuse(first, second, f"problem {key[1]!r} asks {asked}")
    ones, others = (_selected(side.table, common) for side in (first, second))
    metrics = (
        MetricDifference(
            name, rate_of(ones[name]), rate_of(others[name]), difference_of_shares(ones[name], others[name])
        )
        for name in ones
        if name in others
    )
    scores = [fraction.numerators / fraction.denominators for fraction in (ones["accuracy"], others["accuracy"])]
    change = dict(zip(common, (scores[1] - scores[0]).tolist(), strict=True))
    return Comparison(
        first,
        second,
        accuracy=compare_paired(*scores),
        metrics=tuple(metric for metric in metrics if metric.first.n and metric.second.n),
        gained=tuple(_flip(first, second, key, gained=True) for key in common if change[key] > 0),
        lost=tuple(_flip(first, second, key, gained=False) for key in common if change[key] < 0),
        single=max(first.table.samples, second.table.samples) == 1,
        notes=tuple(_notes(first, second, len(common))),
    )


def _title(name: str) -> str:
    """``step 40`` for the folder ``step_00000040``."""
    return f"step {int(name[5:])}" if name.startswith("step_") and name[5:].isdigit() else name


def _progress(name: str) -> tuple[bool, str]:
    """Sorts the evaluations of a run: teachers, ``before``, then steps."""
    return name.startswith("step_"), "" if name.startswith("teacher") else name


def _refuse(first: Side, second: Side, difference: str) -> NoReturn:
    raise NotComparable(
        f"{first.name} and {second.name} cannot be compared: {difference}. "
        "Evaluate both with the same task, version and tools"
    )


def _selected(table: Tally, keys: Sequence[tuple[str, str]]) -> dict[str, Fraction]:
    """The fractions of some problems, in the order of ``keys``."""
    place = {key: index for index, key in enumerate(table.played)}
    rows = [place[key] for key in keys]
    return {name: Fraction(one.numerators[rows], one.denominators[rows]) for name, one in fractions(table).items()}


def _flip(first: Side, second: Side, key: tuple[str, str], *, gained: bool) -> Flip:
    """With several episodes, the first wrong one beside the first right one."""

    def shown(side: Side, correct: bool) -> int:
        episodes = side.table.played[key]
        return next((one.place for one in episodes if one.correct == correct), episodes[0].place)

    return Flip(key[1], first.table.questions[key], shown(first, not gained), shown(second, gained))


def _notes(first: Side, second: Side, common: int) -> Iterator[str]:
    for side in (first, second):
        alone = len(side.table.played) - common
        if alone:
            yield f"{alone} of {len(side.table.played)} problems were played only in {side.name}; they are left out"
    for title, of_first, of_second in (
        ("settings", first.settings, second.settings),
        ("versions", first.versions, second.versions),
    ):
        one, other = _flat(of_first), _flat(of_second)
        known = {"model", "problems"} | (
            {"weights_hash", "server"} if one.get("model") != other.get("model") else set()
        )
        names = [name for name in {**one, **other} if name not in known and one.get(name) != other.get(name)]
        if names:
            yield f"other {title}: " + ", ".join(f"{name} {one.get(name)} → {other.get(name)}" for name in names)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
