"""Training metrics: hand-counted numbers, nothing invented, and a log that survives a kill."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from opd_env.episode.files import StoreError
from opd_env.episode.trajectory import CallRecord, StopReason, TurnRecord
from opd_env.evaluation.counts import summarise
from opd_env.evaluation.read_run import read_metrics
from opd_env.formats.base import TokenKind
from opd_env.tools import ToolErrorKind
from opd_env.trainer.learn.objective import TokenValues
from opd_env.trainer.run.learner import MetricsLog, rollout_metrics, teacher_metrics, token_metrics
from tests.trainer.toy import made_trajectory, toy_config


def with_calls(trajectory, *errors, **changes):
    """The first turn's tokens become calls, one token each."""
    first, *others = trajectory.turns
    calls = tuple(
        CallRecord("calculator", "{}", first.start + place, first.start + place + 1, "", error)
        for place, error in enumerate(errors)
    )
    kind = trajectory.kind.copy()
    kind[first.start : first.start + len(errors)] = TokenKind.TOOL_CALL
    turns = (dataclasses.replace(first, calls=calls), *others)
    return dataclasses.replace(trajectory, turns=turns, kind=kind, **changes)


EPISODES = [
    with_calls(made_trajectory(1), None, ToolErrorKind.INVALID_JSON, correct=True),
    with_calls(made_trajectory(2), ToolErrorKind.SCHEMA, ToolErrorKind.BUDGET, scores={"needs_tool": 0.0}),
    dataclasses.replace(
        made_trajectory(3, turns=(4,)),
        stop_reason=StopReason.TURN_LENGTH,
        turns=(TurnRecord(5, 9, "text", truncated=True),),
        answer=None,
        scores={"needs_tool": 0.0},
    ),
]


def test_rollout_metrics_are_what_can_be_counted_by_hand():
    found = rollout_metrics(EPISODES)
    third = pytest.approx(1 / 3)
    assert found["rollout/accuracy"] == third
    assert found["rollout/tool_call_validity"] == third  # a spent budget is nobody's fault: 3 judged calls
    assert found["rollout/malformed_rate"] == 0  # the episode with an unreadable call also made a readable one
    assert found["rollout/tool_error_rate"] == third
    assert found["rollout/over_call_rate"] == 0.5
    assert found["rollout/calls"] == pytest.approx(4 / 3)
    assert found["rollout/turns"] == pytest.approx(5 / 3)
    assert found["rollout/response_length"] == pytest.approx(14 / 3)
    assert found["rollout/truncated_fraction"] == third
    assert found["rollout/end_of_turn_rate"] == pytest.approx(4 / 5)
    assert found["rollout/time_limit_fraction"] == 0


def test_training_counts_as_evaluations_do():
    unreadable = with_calls(made_trajectory(4), ToolErrorKind.UNTERMINATED, scores={"needs_tool": 0.0})
    kind = EPISODES[2].kind.copy()
    kind[5] = TokenKind.TOOL_CALL
    cut_in_a_call = dataclasses.replace(EPISODES[2], kind=kind)
    episodes = [*EPISODES, unreadable, cut_in_a_call]
    found, summary = rollout_metrics(episodes), summarise(episodes)
    assert found["rollout/malformed_rate"] == summary.malformed.value == pytest.approx(2 / 5)
    assert found["rollout/over_call_rate"] == summary.over_call.value == pytest.approx(3 / 4)
    assert found["rollout/accuracy"] == summary.accuracy.value
    assert found["rollout/tool_call_validity"] == summary.tool_call_validity.value
    assert found["rollout/truncated_fraction"] == summary.truncated.value


def test_the_slowest_episodes_and_those_whose_time_was_up_are_in_the_metrics():
    seconds = [float(n) for n in range(1, 22)]
    reasons = [StopReason.TIME if one > 14 else StopReason.ANSWER for one in seconds]
    found = rollout_metrics(
        [
            dataclasses.replace(EPISODES[0], seconds=one, stop_reason=reason, correct=False)
            for one, reason in zip(seconds, reasons, strict=True)
        ]
    )
    assert [found[f"rollout/episode_seconds_{name}"] for name in ("p50", "p95", "max")] == [11, 20, 21]
    assert found["rollout/time_limit_fraction"] == pytest.approx(1 / 3)


def test_a_rate_without_a_case_is_left_out():
    assert "rollout/tool_call_validity" not in rollout_metrics([made_trajectory(1)])
    assert rollout_metrics([]) == {}


def values(kl):
    kl_N = torch.tensor(kl)
    return TokenValues(-torch.ones(len(kl)), -torch.ones(len(kl)), -kl_N, kl_N, kl_N + 1, -kl_N, kl_N * 0 + 1)


def test_teacher_kl_by_turn_kind_and_quarter():
    # episode 1: turn 1 = call, call, text; turn 2 = two texts.  episode 3: one turn of four texts
    found = teacher_metrics([EPISODES[0], EPISODES[2]], values([1.0, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert found["teacher/kl"] == 5
    assert found["teacher/kl_turn_1"] == pytest.approx((1 + 2 + 3 + 6 + 7 + 8 + 9) / 7)
    assert found["teacher/kl_turn_2"] == 4.5
    assert found["teacher/kl_tool_call"] == 1.5
    assert found["teacher/kl_text"] == pytest.approx((3 + 4 + 5 + 6 + 7 + 8 + 9) / 7)
    assert "teacher/kl_thinking" not in found
    assert found["teacher/kl_quarter_1"] == pytest.approx((1 + 2 + 6) / 3)
    assert found["teacher/kl_quarter_4"] == pytest.approx((5 + 9) / 2)


def test_token_metrics_tell_the_gap_of_the_first_update_from_later_drift(tmp_path):
    behaviour = torch.tensor([-1.0, -2.0])
    first = TokenValues(behaviour, behaviour + 0.01, *(torch.ones(2) for _ in range(5)))
    later = TokenValues(behaviour, behaviour + 1.0, *(torch.tensor([-3.0, 12.0]) for _ in range(5)))
    config = toy_config(tmp_path, estimator="sampled", clip_log_ratio=5.0, truncate_weight=2.0)
    found = token_metrics(TokenValues.joined([first, later]), first, config.objective)
    assert found["train/logprob_gap"] == pytest.approx(0.01, abs=1e-5)
    assert found["train/ratio_bounded_fraction"] == 0.5
    assert found["train/clip_fraction"] == 0.25
    assert found["train/max_abs_advantage"] == 12
    assert found["train/entropy"] == pytest.approx((1 + 1 - 3 + 12) / 4)
    assert found["train/token_weight"] == pytest.approx((1 + 1 - 3 + 12) / 4)


def test_numbers_that_are_not_finite_are_null_in_the_log(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "a": math.nan, "b": -math.inf, "c": 1.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "a": None, "b": None, "c": 1.5}


def test_a_continued_log_drops_later_steps_and_a_cut_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file)
    for step in (1, 2, 2, 3):
        log.write({"step": step})
    with file.open("a") as stream:
        stream.write('{"step": 4, "x"')
    assert [row["step"] for row in read_metrics(file)] == [1, 2, 2, 3]
    MetricsLog(file, last_step=2).write({"step": 3, "new": True})
    assert read_metrics(file) == [{"step": 1}, {"step": 2}, {"step": 2}, {"step": 3, "new": True}]


def test_a_new_log_starts_empty(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsLog(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert read_metrics(tmp_path / "nothing.jsonl") == []


def test_kinds_of_the_episodes_above_are_consistent():
    assert [int(np.sum(one.kind == TokenKind.TOOL_CALL)) for one in EPISODES] == [2, 2, 0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(StoreError, match="No space left on device; free space"):
        log.write({"step": 1})
