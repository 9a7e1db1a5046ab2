"""What the records of the study say: per arm, and per question that was asked before the runs.

Two sources of chance are kept apart. *Seeds*: another order of problems and other samples give another student; the
interval is Student's t over the seeds' means. *Problems*: other test problems would give other scores; McNemar's kind
of test counts the problems that one arm solves more often than the other. A difference is called supported only when
the seeds' interval leaves out 0 and the problems' p-value, corrected (Holm) for the number of questions, is below 0.05.

    OverSeeds((0.1, 0.2, 0.15)).interval       # of the mean over three seeds: (0.026, 0.274)

Test it alone: ``pytest tests/benchmarks/test_opd_plus_study.py``
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median, stdev
from typing import Any

from benchmarks.opd_plus_study.arms import ARMS, COMPARISONS, Arm, arm_named
from opd_env.evaluation.statistics import Rate, compare_paired, rate

Record = Mapping[str, Any]
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % points of Student's t with 1, 2, … 9 degrees of freedom."""


@dataclass(frozen=True)
class OverSeeds:
    """A number per seed, with the interval of its mean."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean (Student's t); unbounded for one seed."""
        n = len(self.values)
        if n < 2:
            return -math.inf, math.inf
        half = STUDENT_T[min(n - 2, len(STUDENT_T) - 1)] * stdev(self.values) / math.sqrt(n)
        return self.mean - half, self.mean + half

    @property
    def excludes_zero(self) -> bool:
        low, high = self.interval
        return low > 0 or high < 0


@dataclass(frozen=True)
class Accuracy:
    """Share of test problems solved, per seed."""

    over_seeds: OverSeeds
    over_problems: Rate
    """All seeds' episodes, clustered by problem."""

    @property
    def interval(self) -> tuple[float, float]:
        """From the lower to the higher end of both intervals: neither source of chance is left out."""
        low, high = self.over_seeds.interval if len(self.over_seeds.values) > 1 else (1.0, 0.0)
        return max(0.0, min(low, self.over_problems.low)), min(1.0, max(high, self.over_problems.high))


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds; shares between 0 and 1."""

    arm: Arm
    seeds: int
    accuracy: Accuracy
    """Greedy, at the checkpoint that validation chose."""
    accuracy_sampled: Accuracy
    """At temperature 1, as in training."""
    accuracy_final: OverSeeds
    """Greedy, after the last step."""
    teacher_kl: OverSeeds
    """KL(student || teacher) per token of test episodes at temperature 1, estimated from what was sampled; nats."""
    over_call: OverSeeds
    """Test episodes with more calls than the problem has steps."""
    response_length: OverSeeds
    """Sampled tokens per test episode, greedy."""
    grad_norm: float
    """Median over steps, before clipping, mean over seeds; nan where no step was logged."""
    clip_fraction: float
    """Mean over steps and seeds: tokens with |log u| above the bound."""


@dataclass(frozen=True)
class Answer:
    """The second arm against the first, on the same seeds and problems."""

    first: Arm
    second: Arm
    accuracy: OverSeeds
    """Difference per seed, greedy."""
    gained: int
    """Problems that the second arm solves in more seeds."""
    lost: int
    p_value: float
    """Exact sign test over problems, corrected by Holm."""
    teacher_kl: OverSeeds
    """Difference per seed; below 0 the second is closer to the teacher."""

    @property
    def supported(self) -> bool:
        return self.accuracy.excludes_zero and self.p_value < 0.05


def summaries(records: Sequence[Record]) -> list[ArmSummary]:
    """The arms that have records, in the order of ``ARMS``."""
    return [_summary(arm, mine) for arm in ARMS if (mine := [one for one in records if one["arm"] == arm.name])]


def answers(records: Sequence[Record]) -> list[Answer]:
    """The comparisons whose arms share a seed."""
    by_run = {(one["arm"], one["seed"]): one["chosen"] for one in records}
    found = []
    for first, second in COMPARISONS:
        seeds = sorted(seed for arm, seed in by_run if arm == first and (second, seed) in by_run)
        if not seeds:
            continue
        pairs = [(by_run[first, seed], by_run[second, seed]) for seed in seeds]
        per_problem = compare_paired(*(_mean_bits([pair[side]["greedy"] for pair in pairs]) for side in (0, 1)))
        found.append(
            Answer(
                first=arm_named(first),
                second=arm_named(second),
                accuracy=OverSeeds(tuple(share(b["greedy"]) - share(a["greedy"]) for a, b in pairs)),
                gained=per_problem.gained,
                lost=per_problem.lost,
                p_value=per_problem.p_value,
                teacher_kl=OverSeeds(tuple(b["teacher_kl"] - a["teacher_kl"] for a, b in pairs)),
            )
        )
    return _holm(found)


def share(bits: str) -> float:
    """Of a record's bits, those that are 1."""
    return bits.count("1") / len(bits)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in the same order (S. Holm, Scand. J. Statist. 6 (1979), p. 65)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _holm(found: Sequence[Answer]) -> list[Answer]:
    corrected = holm([one.p_value for one in found])
    return [replace(one, p_value=p_value) for one, p_value in zip(found, corrected, strict=True)]


def _summary(arm: Arm, records: Sequence[Record]) -> ArmSummary:
    def over(part: str, name: str) -> OverSeeds:
        values = [(one[part] or one["chosen"])[name] for one in records]
        return OverSeeds(tuple(share(value) if isinstance(value, str) else value for value in values))

    def accuracy(name: str) -> Accuracy:
        solved = [sum(map(int, column)) for column in zip(*(one["chosen"][name] for one in records), strict=True)]
        return Accuracy(over("chosen", name), rate(solved, [len(records)] * len(solved)))

    return ArmSummary(
        arm=arm,
        seeds=len(records),
        accuracy=accuracy("greedy"),
        accuracy_sampled=accuracy("sampled"),
        accuracy_final=over("final", "greedy"),
        teacher_kl=over("chosen", "teacher_kl"),
        over_call=over("chosen", "over_call"),
        response_length=over("chosen", "response_length"),
        grad_norm=_mean([median(norms) for one in records if (norms := one["curves"]["grad_norm"])]),
        clip_fraction=_mean([value for one in records for value in one["curves"]["clip_fraction"]]),
    )


def _mean(values: Sequence[float]) -> float:
    return mean(values) if values else math.nan


def _mean_bits(rows: Sequence[str]) -> list[float]:
    """Per problem, the share of seeds that solve it."""
    return [mean(map(int, column)) for column in zip(*rows, strict=True)]
