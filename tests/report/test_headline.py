"""The headline says whether a run helped, and names what a person would ask next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opd_env.evaluation.read_run import Run
from opd_env.evaluation.statistics import rate
from opd_env.report.headline import headline, no_better
from tests.episode.trajectory_samples import make_trajectories
from tests.run_samples import make_run

PROBLEMS = 30


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.read(make_run(tmp_path_factory.mktemp("runs") / "demo", problems=PROBLEMS, steps=2))


def with_skill(run: Run, key: str, skill: float) -> Run:
    """The run, had this model been right on another share of the problems."""
    played = make_trajectories(PROBLEMS, skill)
    accuracy = rate([1.0 if one.correct else 0.0 for one in played])
    return replace(
        run, models=dict(run.models) | {key: replace(run.models[key], accuracy=accuracy, trajectories=played)}
    )


def with_kl(run: Run, *values: float) -> Run:
    return replace(run, metrics=[{"step": step, "teacher/kl": value} for step, value in enumerate(values, start=1)])


def test_a_student_that_learned_is_measured_by_its_teacher(run: Run) -> None:
    share = run.models["after"].accuracy.value / run.models["teacher"].accuracy.value
    text = headline(run)
    assert f"The student reaches {100 * share:.0f} % of its teacher's" in text
    assert "worse" not in text
    assert "nothing to teach" not in text


def test_a_student_that_got_worse_is_told_with_what_to_try(run: Run) -> None:
    worse = with_skill(run, "after", 0.0)
    assert "The student got worse." in headline(with_kl(worse, 2.0, 1.0))
    assert "The student got worse." in headline(with_kl(worse))
    rose = "got worse, and its KL to the teacher rose from 0.9 to 4.1 nats per token: a lower learning_rate"
    assert rose in headline(with_kl(worse, 0.9, 2.0, 4.1))


def test_without_a_significant_loss_nothing_is_called_worse(run: Run) -> None:
    same = replace(run, models=dict(run.models) | {"after": run.models["before"]})
    assert "worse" not in headline(with_kl(same, 1.0, 2.0))


@pytest.mark.parametrize("skill", [0.0, 0.2])
def test_a_teacher_that_is_no_better_than_the_student_was_is_named(run: Run, skill: float) -> None:
    poor = with_skill(run, "teacher", skill)
    sentence = no_better(poor.models["teacher"].accuracy.value, poor.models["before"].accuracy.value)
    assert f"Its {sentence}." in headline(poor)
    assert "% of its teacher's" not in headline(poor)
