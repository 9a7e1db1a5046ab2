"""Exports hold the numbers and the words of the evaluation, in the other tools' shapes.

``scripts/check_exports.py`` reads them with the real packages; these tests need neither.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_env.cli import main
from opd_env.episode.trajectory import StopReason, Trajectory
from opd_env.errors import UserError
from opd_env.evaluation.comparison import read_side
from opd_env.evaluation.counts import summarise
from opd_env.evaluation.statistics import standard_error
from opd_env.plugins.exports import export_evaluation
from opd_env.tools import ToolErrorKind
from tests.episode.trajectory_samples import Call, make_trajectories, make_trajectory
from tests.run_samples import write_evaluation

GOOD = Call("calculator", '{"expression": "6*7"}', "42")
UNREADABLE = Call(None, '{"name": "calc', "no JSON", ToolErrorKind.INVALID_JSON)
SLOW = Call("calculator", '{"expression": "9**9"}', "too slow", ToolErrorKind.TIMEOUT)


def exported(tmp_path: Path, to: str, trajectories: list[Trajectory], **settings: Any) -> list[Path]:
    write_evaluation(tmp_path / "eval", trajectories, **settings)
    return export_evaluation(tmp_path / "eval", to, tmp_path / "out")


def inspect_log(tmp_path: Path, *trajectories: Trajectory, **settings: Any) -> dict[str, Any]:
    (path,) = exported(tmp_path, "inspect", list(trajectories), **settings)
    log: dict[str, Any] = json.loads(path.read_text())
    return log


def test_an_inspect_log_has_every_episode_with_its_score(tmp_path: Path) -> None:
    episodes = make_trajectories(6, 0.5, samples=2)
    log = inspect_log(tmp_path, *episodes, samples=2)
    assert [(s["id"], s["epoch"]) for s in log["samples"]] == [(one.example_id, one.sample + 1) for one in episodes]
    assert [s["scores"]["correct"]["value"] == "C" for s in log["samples"]] == [one.correct for one in episodes]
    summary = summarise(episodes)
    metrics = {name: entry["value"] for name, entry in log["results"]["scores"][0]["metrics"].items()}
    assert metrics["accuracy"] == summary.accuracy.value
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == (summary.accuracy.low, summary.accuracy.high)
    assert metrics["pass@2"] == summary.pass_at_k[2].value
    assert log["eval"]["task"] == "arithmetic_with_tools"
    assert log["eval"]["metadata"]["settings"]["prompt_hash"] == "5d41402abc4b2a76"


def test_an_inspect_sample_has_calls_answers_and_errors_in_order(tmp_path: Path) -> None:
    one = make_trajectory(turns=[["Let me see. ", UNREADABLE, SLOW], [GOOD], ["It is 42."]], extracted="42")
    (sample,) = inspect_log(tmp_path, one)["samples"]
    roles = [message["role"] for message in sample["messages"]]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "tool", "assistant"]
    first = sample["messages"][1]
    assert first["content"] == "Let me see."
    assert first["tool_calls"][0]["parse_error"]
    assert first["tool_calls"][1]["arguments"] == {"expression": "9**9"}
    assert [m.get("error", {}).get("type") for m in sample["messages"] if m["role"] == "tool"] == [
        "parsing", "timeout", None,
    ]  # fmt: skip
    assert sample["output"]["completion"] == "It is 42."
    assert sample["scores"]["correct"]["answer"] == "42"


@pytest.mark.parametrize("value", ["NaN", "1e999", r'"\ud83d"', "[" * 100_000])
def test_arguments_that_no_log_can_hold_are_shown_as_they_were_written(tmp_path: Path, value: str) -> None:
    written = f'{{"expression": {value}}}'
    call = Call("calculator", written, "no JSON", ToolErrorKind.INVALID_JSON)
    (sample,) = inspect_log(tmp_path, make_trajectory(turns=[[call], ["?"]]))["samples"]
    (shown,) = sample["messages"][1]["tool_calls"]
    assert (shown["arguments"], shown["parse_error"]) == ({}, written)


def test_what_the_user_said_later_stands_between_the_turns_in_inspect(tmp_path: Path) -> None:
    one = make_trajectory(turns=[["pens pens"], ["It is 42."]])
    asked = replace(one, turns=(replace(one.turns[0], user="And now?"), one.turns[1]))
    (sample,) = inspect_log(tmp_path, asked)["samples"]
    said = [(message["role"], message["content"]) for message in sample["messages"]]
    assert said[1:] == [("assistant", "pens pens"), ("user", "And now?"), ("assistant", "It is 42.")]


def test_an_episode_that_a_budget_ended_says_so_in_inspect(tmp_path: Path) -> None:
    one = make_trajectory(turns=[["pens pens"]], stop_reason=StopReason.TURN_LENGTH, correct=False)
    (sample,) = inspect_log(tmp_path, one)["samples"]
    assert sample["limit"] == {"type": "token", "limit": 256, "reason": "turn_length"}
    assert sample["output"]["choices"][0]["stop_reason"] == "max_tokens"


def test_lm_eval_results_and_samples_agree_with_the_evaluation(tmp_path: Path) -> None:
    episodes = make_trajectories(8, 0.5, samples=2)
    results_file, samples_file = exported(tmp_path, "lm-eval", episodes, samples=2)
    results = json.loads(results_file.read_text())
    rows = [json.loads(line) for line in samples_file.read_text().splitlines()]
    task = "opd_env_arithmetic_with_tools"
    summary = summarise(episodes)
    assert results["results"][task]["accuracy,none"] == summary.accuracy.value
    assert results["n-samples"][task] == {"original": 200, "effective": 8}
    assert results["higher_is_better"][task]["truncated"] is False
    assert results["higher_is_better"][task]["called"] is None
    assert sum(row["accuracy"] for row in rows) / 8 == pytest.approx(summary.accuracy.value)
    assert [len(row["resps"][0]) for row in rows] == [2] * 8
    assert results_file.parent.name == "packaged__student"


def test_a_score_without_tools_is_named_without_them(tmp_path: Path) -> None:
    _, samples_file = exported(tmp_path, "lm-eval", [make_trajectory()], tools=[])
    assert samples_file.name.startswith("samples_opd_env_arithmetic_2")


def test_the_same_evaluation_is_exported_to_the_same_files(tmp_path: Path) -> None:
    paths = exported(tmp_path, "inspect", make_trajectories(3, 0.5))
    before = [path.read_bytes() for path in paths]
    assert export_evaluation(tmp_path / "eval", "inspect", tmp_path / "out") == paths
    assert [path.read_bytes() for path in paths] == before


def test_the_standard_error_is_the_clustered_one() -> None:
    correct = np.array([1.0, 0, 1, 1, 0, 0, 1])
    assert standard_error(correct, np.ones(7)) == pytest.approx(correct.std(ddof=1) / np.sqrt(7))
    top, bottom = np.array([3.0, 0, 2, 1]), np.array([4.0, 4, 4, 4])
    assert standard_error(top, bottom) == pytest.approx((top / bottom).std(ddof=1) / 2)
    assert np.isnan(standard_error([1.0], [1.0]))
    assert np.isnan(standard_error([0.0, 0.0], [0.0, 0.0]))


def test_an_unknown_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="there are inspect and lm-eval"):
        export_evaluation(tmp_path, "csv", tmp_path)
    assert main(["export", str(tmp_path), "--to", "csv"]) == 2
    assert "there is no format 'csv'" in capsys.readouterr().err


def test_the_command_prints_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_evaluation(tmp_path / "eval", make_trajectories(3, 0.5))
    assert main(["export", str(tmp_path / "eval"), "--to", "lm-eval", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.split()
    assert [Path(line).exists() for line in printed] == [True, True]
    assert read_side(tmp_path / "eval").finished > 0
