"""Every rate of a summary on episodes small enough to count by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.episode.trajectory import StopReason, Trajectory
from opd_env.evaluation.counts import NEEDS_TOOL, Summary, fractions, summarise, tally
from opd_env.evaluation.statistics import NO_RATE, pass_at_k, rate, wilson
from opd_env.tools import ToolErrorKind
from tests.episode.trajectory_samples import Call, make_trajectories, make_trajectory

GOOD = Call("calculator", '{"expression": "6*7"}', "42")
UNREADABLE = Call(None, '{"name": "calculator", "arg', "…", ToolErrorKind.INVALID_JSON)
UNKNOWN = Call("calc", '{"expression": "6*7"}', "…", ToolErrorKind.UNKNOWN_TOOL)
MISFIT = Call("calculator", '{"expr": 1}', "…", ToolErrorKind.SCHEMA)
FAILED = Call("calculator", '{"expression": "1/0"}', "…", ToolErrorKind.EXCEPTION)
NO_SANDBOX = Call("python", '{"code": "1"}', "…", ToolErrorKind.SANDBOX)
OVER_BUDGET = Call("calculator", '{"expression": "1"}', "…", ToolErrorKind.BUDGET)


def episode(*turns: list[str | Call], **fields: object) -> Trajectory:
    return make_trajectory(turns=[*turns, ["Done."]], **fields)  # type: ignore[arg-type]


def numbered(*episodes: list[list[str | Call]]) -> list[Trajectory]:
    return [episode(*turns, example_id=str(index)) for index, turns in enumerate(episodes)]


def test_one_episode_per_problem_has_a_wilson_interval() -> None:
    summary = summarise(make_trajectory(example_id=str(i), correct=i < 7) for i in range(10))
    assert summary.accuracy == wilson(7, 10)
    assert (summary.n, summary.episodes, summary.samples) == (10, 10, 1)
    assert summary.pass_at_k == {1: wilson(7, 10)}


def test_several_episodes_per_problem_are_clustered() -> None:
    correct = [3, 0, 2, 1, 0]
    episodes = [
        make_trajectory(example_id=str(problem), sample=sample, correct=sample < correct[problem])
        for problem in range(5)
        for sample in range(3)
    ]
    summary = summarise(episodes)
    assert (summary.n, summary.episodes, summary.samples) == (5, 15, 3)
    assert summary.accuracy == rate(correct, [3] * 5)
    assert list(summary.pass_at_k) == [1, 2, 3]
    assert summary.pass_at_k[2].value == pytest.approx(sum(pass_at_k(3, c, 2) for c in correct) / 5)
    assert summary.pass_at_k[3].value == pytest.approx(3 / 5)


def test_pass_at_k_leaves_out_problems_with_too_few_episodes() -> None:
    episodes = [make_trajectory(example_id="a", sample=i, correct=False) for i in range(2)]
    summary = summarise([*episodes, make_trajectory(example_id="b", correct=True)])
    assert summary.pass_at_k[2].n == 1
    assert summary.pass_at_k[2].value == 0


def test_problems_of_two_tasks_with_the_same_id_are_different() -> None:
    assert summarise([make_trajectory(task="a"), make_trajectory(task="b")]).n == 2


def test_the_stages_of_a_call_are_conditional_and_multiply_to_validity() -> None:
    summary = summarise(
        numbered([[GOOD, GOOD, FAILED]], [[MISFIT], [GOOD]], [[UNKNOWN, UNREADABLE]], [[UNREADABLE]], [])
    )
    assert summary.calls == 8
    assert summary.parse_rate.value == 6 / 8
    assert summary.name_rate.value == 5 / 6
    assert summary.argument_rate.value == 4 / 5
    assert summary.execution_rate.value == 3 / 4
    assert summary.tool_call_validity.value == 3 / 8
    stages = (summary.parse_rate, summary.name_rate, summary.argument_rate, summary.execution_rate)
    assert math.prod(stage.value for stage in stages) == pytest.approx(summary.tool_call_validity.value)
    assert summary.tool_call_validity.n == 4  # the problem without a call says nothing
    assert summary.tool_errors["invalid_json"] == 2
    assert sum(summary.tool_errors.values()) == 5


@pytest.mark.parametrize("kind", [ToolErrorKind.UNTERMINATED, ToolErrorKind.INVALID_JSON, ToolErrorKind.NOT_AN_OBJECT])
def test_every_unreadable_block_fails_at_the_first_stage(kind: ToolErrorKind) -> None:
    summary = summarise([episode([Call(None, "{", "…", kind)])])
    assert summary.parse_rate.value == 0
    assert summary.name_rate is NO_RATE


@pytest.mark.parametrize("kind", [ToolErrorKind.TIMEOUT, ToolErrorKind.OUTPUT_LIMIT, ToolErrorKind.EXCEPTION])
def test_a_tool_that_fails_on_a_call_counts_against_it(kind: ToolErrorKind) -> None:
    summary = summarise([episode([Call("calculator", "{}", "…", kind)])])
    assert (summary.argument_rate.value, summary.execution_rate.value) == (1, 0)
    assert summary.tool_call_validity.value == 0


def test_a_failed_sandbox_or_spent_budget_is_not_the_students() -> None:
    summary = summarise([episode([GOOD, NO_SANDBOX], [OVER_BUDGET])])
    assert summary.tool_call_validity.value == 1
    assert summary.recovery is NO_RATE
    assert summary.calls == 3
    assert (summary.tool_errors["sandbox"], summary.tool_errors["budget"]) == (1, 1)


def test_called_malformed_and_abstained_are_told_apart() -> None:
    summary = summarise(numbered([[UNREADABLE], [GOOD]], [[UNREADABLE]], [], [[UNKNOWN]]))
    shares = (summary.called.value, summary.malformed.value, summary.abstained.value)
    assert shares == (0.5, 0.25, 0.25)


def test_a_call_that_a_length_limit_cut_is_a_malformed_attempt() -> None:
    cut = make_trajectory(turns=[[GOOD]], stop_reason=StopReason.TURN_LENGTH)
    cut = replace(cut, turns=tuple(replace(turn, calls=(), truncated=True) for turn in cut.turns))
    summary = summarise([cut])
    assert (summary.malformed.value, summary.abstained.value, summary.calls) == (1, 0, 0)


@given(
    st.lists(
        st.lists(st.sampled_from([GOOD, UNREADABLE, UNKNOWN, MISFIT, FAILED, NO_SANDBOX, OVER_BUDGET])),
        min_size=1,
    )
)
def test_called_malformed_and_abstained_add_up_to_one(episodes: list[list[Call]]) -> None:
    summary = summarise(numbered(*([list(calls)] for calls in episodes)))
    assert summary.called.value + summary.malformed.value + summary.abstained.value == pytest.approx(1)
    answered = sum(call.error is None for calls in episodes for call in calls)
    judged = sum(call not in (NO_SANDBOX, OVER_BUDGET) for calls in episodes for call in calls)
    assert summary.tool_call_validity.value == (answered / judged if judged else pytest.approx(math.nan, nan_ok=True))


def test_over_and_under_calls_are_counted_only_where_the_task_says_what_is_needed() -> None:
    free, bound = {NEEDS_TOOL: 0.0}, {NEEDS_TOOL: 1.0}
    summary = summarise(
        [
            episode([UNREADABLE], example_id="0", scores=free),
            episode(example_id="1", scores=free),
            episode([GOOD], example_id="2", scores=bound),
            episode(example_id="3", scores=bound),
            episode([UNREADABLE], example_id="4", scores=bound),
            episode([GOOD], example_id="5"),
        ]
    )
    assert (summary.over_call.value, summary.over_call.n) == (0.5, 2)
    assert (summary.under_call.value, summary.under_call.n) == (pytest.approx(2 / 3), 3)
    assert NEEDS_TOOL not in summary.scores
    assert summarise([episode([GOOD])]).over_call is NO_RATE


def test_repeats_ignore_spacing_and_key_order_but_not_values() -> None:
    first = Call("f", '{"a": 1, "b": 2}', "…")
    same, other = Call("f", '{"b":2,"a":1}', "…"), Call("f", '{"a": 1, "b": 3}', "…")
    assert summarise([episode([first], [same, other])]).repeated.value == pytest.approx(1 / 3)
    assert summarise([episode([first], example_id="0"), episode([same], example_id="1")]).repeated.value == 0


def test_recovery_needs_a_later_turn() -> None:
    assert summarise([episode([FAILED], [UNREADABLE], [GOOD])]).recovery.value == 1
    assert summarise([episode([FAILED, GOOD])]).recovery.value == 0  # written before the error could be read
    assert summarise([episode([GOOD], [FAILED])]).recovery.value == 0
    assert summarise([episode([GOOD])]).recovery is NO_RATE


def test_every_stop_reason_is_listed_and_budgets_count_as_truncated() -> None:
    summary = summarise(
        make_trajectory(example_id=str(index), stop_reason=reason) for index, reason in enumerate(StopReason)
    )
    assert summary.stop_reasons == dict.fromkeys(map(str, StopReason), 1)
    assert summary.truncated.value == (len(StopReason) - 2) / len(StopReason)


def test_sizes_are_means_per_episode_and_drift_is_a_total() -> None:
    episodes = [
        episode([GOOD], example_id="0", drift=2, seconds=1.0),
        episode(example_id="1", drift=3, seconds=2.0),
    ]
    summary = summarise(episodes)
    assert (summary.calls_per_episode, summary.turns_per_episode) == (0.5, 1.5)
    assert summary.sampled_tokens_per_episode == sum(e.num_sampled for e in episodes) / 2
    assert summary.tokens_per_episode == sum(len(e.token_ids) for e in episodes) / 2
    assert (summary.drift, summary.seconds_per_episode) == (5, 1.5)


def test_accuracy_is_split_by_difficulty() -> None:
    summary = summarise(
        make_trajectory(example_id=str(i), difficulty=1 + i % 2, correct=i in (0, 1, 2)) for i in range(8)
    )
    assert summary.by_difficulty == {1: wilson(2, 4), 2: wilson(1, 4)}


def test_accuracy_is_split_by_category_of_problem() -> None:
    episodes = [make_trajectory(example_id=str(i), category="ab"[i % 2], correct=i < 3) for i in range(6)]
    assert summarise(episodes).by_category == {"a": wilson(2, 3), "b": wilson(1, 3)}


def test_majority_needs_several_samples_with_an_extracted_answer() -> None:
    def one(sample: int, extracted: str | None, correct: bool) -> Trajectory:
        return make_trajectory(sample=sample, extracted=extracted, correct=correct)

    summary = summarise([one(0, "5", False), one(1, "4", True), one(2, "4", True), one(3, None, False)])
    assert list(summary.majority_at_k) == [2, 4]
    assert summary.majority_at_k[4].value == 1
    assert summary.majority_at_k[2].value == pytest.approx((1 + 0.5 * 2 + 2 + 0) / 6)
    assert summarise([one(0, "4", True)]).majority_at_k == {}
    assert summarise([one(0, None, True), one(1, None, True)]).majority_at_k == {}


def test_a_score_named_as_a_rate_is_kept_apart_in_tables() -> None:
    found = fractions(tally([make_trajectory(scores={"called": 1.0})]))
    assert (found["grader/called"].numerators.sum(), found["called"].numerators.sum()) == (1, 0)


def test_summaries_of_earlier_versions_can_be_read() -> None:
    flat = summarise(make_trajectories(4, 0.5)).to_json()
    del flat["by_category"], flat["majority_at_k"], flat["retries"]
    assert Summary.from_json(flat).by_category == {}
    assert Summary.from_json(flat).retries == 0


def test_retries_of_answered_and_failed_calls_are_added_up() -> None:
    again, in_vain = Call("a", "{}", "1", retries=2), Call("a", "{}", "…", ToolErrorKind.EXCEPTION, retries=3)
    assert summarise([episode([again, GOOD], [in_vain]), episode([GOOD])]).retries == 5


def test_grader_scores_are_averaged_over_the_episodes_that_have_them() -> None:
    summary = summarise(
        [
            make_trajectory(example_id="0", scores={"strict": 1.0, "reward": 5.0}),
            make_trajectory(example_id="1", scores={"strict": 0.0, "reward": -1.0}),
            make_trajectory(example_id="2", scores={}),
        ]
    )
    assert summary.scores["strict"] == wilson(1, 2)
    assert (summary.scores["reward"].value, summary.scores["reward"].n) == (2.0, 2)


def test_no_episodes_give_an_empty_summary() -> None:
    summary = summarise([])
    assert (summary.n, summary.accuracy, summary.pass_at_k) == (0, NO_RATE, {})
    assert json.loads(json.dumps(summary.to_json(), allow_nan=False))["accuracy"] is None


def test_json_has_the_public_keys_and_comes_back() -> None:
    summary = summarise(make_trajectories(40, 0.5, samples=2))
    flat = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert flat["accuracy"] == summary.accuracy.value
    assert flat["accuracy_ci"] == [summary.accuracy.low, summary.accuracy.high]
    assert flat["tool_call_validity"] == summary.tool_call_validity.value
    assert flat["n"] == 40
    assert Summary.from_json(flat) == summary
    assert Summary.from_json(json.loads(json.dumps(summarise([]).to_json()))).accuracy is NO_RATE


def test_importing_metrics_pulls_in_no_heavy_library() -> None:
    code = "import sys, opd_env.evaluation.counts; print({'torch', 'pyarrow', 'matplotlib'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
