"""Comparisons: the right pairs and flips, refusals that name both sides, and a page that stands alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd_env.cli import main
from opd_env.episode.trajectory import Trajectory
from opd_env.evaluation.comparison import NotComparable, Side, compare, named_by_model, read_side
from opd_env.evaluation.statistics import compare_paired, rate, sign_test
from opd_env.report.comparison_page import write_comparison
from tests.episode.trajectory_samples import Call, make_trajectories, make_trajectory
from tests.run_samples import make_run, write_evaluation


def played(*correct: bool, **fields: Any) -> list[Trajectory]:
    return [
        make_trajectory(example_id=str(i), question=f"What is {i}?", correct=right, **fields)
        for i, right in enumerate(correct)
    ]


def side(folder: Path, trajectories: list[Trajectory], **settings: Any) -> Side:
    write_evaluation(folder, trajectories, **settings)
    return read_side(folder, name=folder.name)


def test_accuracy_is_paired_and_flips_are_listed(tmp_path: Path) -> None:
    first = side(tmp_path / "a", played(True, False, False, True, False))
    second = side(tmp_path / "b", played(True, True, True, False, False))
    comparison = compare(first, second)
    assert comparison.accuracy == compare_paired([1, 0, 0, 1, 0], [1, 1, 1, 0, 0])
    assert comparison.accuracy.p_value == sign_test(2, 1)
    assert [flip.example_id for flip in comparison.gained] == ["1", "2"]
    assert [flip.example_id for flip in comparison.lost] == ["3"]
    assert first.trajectories[comparison.lost[0].first].correct
    assert not second.trajectories[comparison.lost[0].second].correct
    assert comparison.single
    assert comparison.notes == ()


def test_problems_are_paired_by_id_whatever_their_order(tmp_path: Path) -> None:
    episodes = played(True, False, True, False)
    comparison = compare(side(tmp_path / "a", episodes), side(tmp_path / "b", episodes[::-1]))
    assert (comparison.accuracy.value, comparison.gained, comparison.lost) == (0, (), ())


def test_only_common_problems_count_and_the_others_are_told(tmp_path: Path) -> None:
    first = side(tmp_path / "a", played(True, True, True))
    second = side(tmp_path / "b", played(False, True, False, False, False))
    comparison = compare(first, second)
    assert comparison.metrics[0].second == rate([0, 1, 0])
    assert comparison.notes == ("2 of 5 problems were played only in b; they are left out",)


def test_every_metric_of_both_sides_has_a_difference(tmp_path: Path) -> None:
    good = Call("calculator", '{"expression": "6*7"}', "42")
    first = side(tmp_path / "a", played(False, False, turns=[["It is 42."]]))
    second = side(tmp_path / "b", played(True, True, turns=[[good], ["It is 42."]]))
    by_name = {metric.name: metric for metric in compare(first, second).metrics}
    assert by_name["called"].difference.value == 1
    assert by_name["abstained"].difference.value == -1
    assert "tool_call_validity" not in by_name  # the first made no call


def test_several_samples_compare_means_and_show_an_episode_of_each_kind(tmp_path: Path) -> None:
    def four(rights: int) -> list[Trajectory]:
        return [make_trajectory(sample=s, correct=s >= 4 - rights, extracted=str(s >= 4 - rights)) for s in range(4)]

    first, second = side(tmp_path / "a", four(1)), side(tmp_path / "b", four(3))
    comparison = compare(first, second)
    assert comparison.accuracy.value == 0.5
    names = [metric.name for metric in comparison.metrics][:5]
    assert names == ["accuracy", "pass@1", "pass@2", "pass@4", "majority@2"]
    (flip,) = comparison.gained
    assert not first.trajectories[flip.first].correct
    assert second.trajectories[flip.second].correct
    assert not comparison.single


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"version": "2"}, "version is '1' in the first and '2' in the second"),
        ({"prompt_hash": "other"}, "prompt hash is '5d41402abc4b2a76' in the first and 'other' in the second"),
        ({"tools": []}, r"tools is \['calculator'\] in the first and \[\] in the second"),
        ({"task": "gsm8k"}, "task is 'arithmetic' in the first and 'gsm8k' in the second"),
        ({"split": "validation"}, "split is 'test' in the first"),
    ],
)
def test_other_problems_or_prompts_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], difference: str
) -> None:
    first, second = side(tmp_path / "a", played(True)), side(tmp_path / "b", played(True), **settings)
    with pytest.raises(NotComparable, match=f"a and b cannot be compared: {difference}"):
        compare(first, second)


def test_a_problem_that_asks_something_else_is_refused(tmp_path: Path) -> None:
    first = side(tmp_path / "a", [make_trajectory(question="What is 1?")])
    second = side(tmp_path / "b", [make_trajectory(question="What is 2?")])
    with pytest.raises(NotComparable, match=r"problem '0' asks 'What is 1\?' in the first and 'What is 2\?'"):
        compare(first, second)


def test_no_common_problem_is_refused(tmp_path: Path) -> None:
    first = side(tmp_path / "a", [make_trajectory(example_id="x")])
    second = side(tmp_path / "b", [make_trajectory(example_id="y")])
    with pytest.raises(NotComparable, match="no problem in common"):
        compare(first, second)


def test_other_sampling_is_told_but_not_refused(tmp_path: Path) -> None:
    first = side(tmp_path / "a", played(True))
    second = side(tmp_path / "b", played(True), sampling={"temperature": 1.0, "max_tokens": 256}, model="another")
    assert compare(first, second).notes == ("other settings: sampling.temperature 0.0 → 1.0",)


def test_sides_are_called_by_their_models_only_where_these_differ(tmp_path: Path) -> None:
    sides = [side(tmp_path / name, played(True), model=model) for name, model in (("a", "x"), ("b", "y"), ("c", "y"))]
    assert [one.name for one in named_by_model(sides[:2])] == ["x", "y"]
    assert [one.name for one in named_by_model(sides)] == ["a", "b", "c"]


def test_other_weights_are_told_only_of_one_model(tmp_path: Path) -> None:
    first, second = (side(tmp_path / h, played(True), weights_hash=h) for h in ("01", "02"))
    other = side(tmp_path / "c", played(True), weights_hash="03", model="another")
    assert compare(first, second).notes == ("other settings: weights_hash 01 → 02",)
    assert compare(first, other).notes == ()


def test_a_run_folder_stands_for_its_last_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", problems=20, steps=8)
    after = read_side(run)
    assert after.name == f"{run} (after)"
    assert [step for step, _ in after.curve] == [0, 2, 4, 6, 8]
    assert read_side(run / "evaluations" / "before" / "results.json").curve == ()
    comparison = compare(read_side(run / "evaluations" / "before"), after)
    assert comparison.accuracy.gained == len(comparison.gained) > 0


def test_an_unfinished_run_stands_for_its_latest_checkpoint(tmp_path: Path) -> None:
    for name in ("before", "step_00000002", "step_00000010", "teacher", "teacher_2"):
        write_evaluation(tmp_path / "run" / "evaluations" / name, played(True))
    assert read_side(tmp_path / "run").name.endswith("(step 10)")


def test_a_run_without_a_checkpoint_stands_for_the_student_before_it_and_for_no_teacher(tmp_path: Path) -> None:
    for name in ("before", "teacher", "teacher_2"):
        write_evaluation(tmp_path / "evaluations" / name, played(True))
    assert read_side(tmp_path).name.endswith("(before)")


@pytest.mark.parametrize(
    ("removed", "sentence"),
    [("results.json", "holds no evaluation"), ("trajectories.parquet", "holds no trajectories beside its results")],
)
def test_a_folder_without_what_is_needed_is_refused(tmp_path: Path, removed: str, sentence: str) -> None:
    write_evaluation(tmp_path, played(True))
    (tmp_path / removed).unlink()
    with pytest.raises(NotComparable, match=sentence):
        read_side(tmp_path)


def test_a_models_folder_of_several_tasks_names_its_evaluations(tmp_path: Path) -> None:
    for task in ("arithmetic-1", "gsm8k-2"):
        write_evaluation(tmp_path / task, played(True))
    with pytest.raises(NotComparable, match=r"holds 2 evaluations; name one of them: .*arithmetic-1, .*gsm8k-2"):
        read_side(tmp_path)


def test_results_without_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"evaluation": {"accuracy": 1.0}}))
    with pytest.raises(NotComparable, match="does not say how it was played"):
        read_side(tmp_path)


def test_the_page_stands_alone_and_escapes_what_models_wrote(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\u202e"
    first = side(tmp_path / "a", [make_trajectory(correct=False, question=hostile, turns=[[hostile]])])
    second = side(tmp_path / "b", [make_trajectory(correct=True, question=hostile, turns=[[hostile]])])
    page = write_comparison([compare(first, second)], tmp_path / "new" / "page.html").read_text()
    assert "<script" not in page
    assert "\u202e" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert page.count('class="side"') == 2
    assert "http://" not in page
    assert "https://" not in page


def test_the_page_shows_curves_and_counts_the_flips_it_leaves_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", problems=120, steps=8)
    comparison = compare(read_side(run / "evaluations" / "before"), read_side(run))
    page = write_comparison([comparison], tmp_path / "page.html").read_text()
    assert "Learning curves" in page
    assert f"Gained: {len(comparison.gained)} problems, of which 30 are shown" in page


def test_the_command_shows_differences_flips_and_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", problems=40, steps=8)
    assert main(["compare", str(run), "--output", str(tmp_path / "page.html"), "--flips", "2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "McNemar's exact test" in shown
    assert "Tool-call validity" in shown
    assert "gained: " in shown
    assert "more (--flips)" in shown
    assert "<tool_call>" in shown
    assert "Learning curves" in shown
    assert (tmp_path / "page.html").exists()


def test_the_command_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_evaluation(tmp_path / "a", make_trajectories(3, 0.5))
    write_evaluation(tmp_path / "b", make_trajectories(3, 0.5), version="2")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "version is '1' in the first and '2' in the second" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a")]) == 2
    assert "nothing to be compared with" in capsys.readouterr().err
