"""A trajectory refuses arrays that cannot be right, and survives being written as a row."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from opd_env.episode.trajectory import CallRecord, StopReason, Trajectory, TurnRecord
from opd_env.formats.base import TokenKind
from opd_env.tools import ToolErrorKind

KINDS = "PPCCTSOSTT"  # two prompt tokens, a call, end of turn, scaffold, output, scaffold, the answer
_KIND = {
    "P": TokenKind.PROMPT,
    "C": TokenKind.TOOL_CALL,
    "T": TokenKind.TEXT,
    "S": TokenKind.SCAFFOLD,
    "O": TokenKind.TOOL_OUTPUT,
    "H": TokenKind.HISTORY,
}


def fields(*, kinds: str = KINDS, **changes: Any) -> dict[str, Any]:
    kind = np.array([_KIND[letter] for letter in kinds], dtype=np.uint8)
    sampled = np.isin(kind, [TokenKind.TEXT, TokenKind.TOOL_CALL])
    call = CallRecord(
        "f", '{"x": "é"}', start=2, stop=4, output="\ud83d".encode("utf-8", "replace").decode(), seconds=0.5
    )
    values: dict[str, Any] = {
        "task": "t",
        "example_id": "e",
        "sample": 0,
        "token_ids": np.arange(10, dtype=np.int32),
        "sampled": sampled,
        "kind": kind,
        "turn": np.array([0, 0, 1, 1, 1, 1, 1, 1, 2, 2], dtype=np.int16),
        "logprobs": np.where(sampled, -0.25, 0).astype(np.float32),
        "turns": (TurnRecord(2, 5, "call", calls=(call,)), TurnRecord(8, 10, "answer")),
        "stop_reason": StopReason.ANSWER,
        "answer": "answer",
        "correct": True,
        "scores": {"strict": 1.0},
    }
    return values | changes


def test_a_right_one_is_accepted_and_counts_its_tokens() -> None:
    trajectory = Trajectory(**fields())
    assert trajectory.num_sampled == 5
    assert [call.name for call in trajectory.calls] == ["f"]


def test_rows_are_where_they_begin() -> None:
    trajectory = Trajectory(**fields(kinds="PPCCTHHSTT", row_starts=(0, 5)))
    assert trajectory.rows == [slice(0, 5), slice(5, 10)]
    assert Trajectory.from_row(json.loads(json.dumps(trajectory.to_row()))).row_starts == (0, 5)
    assert Trajectory(**fields()).rows == [slice(0, 10)]


@pytest.mark.parametrize(
    ("kinds", "row_starts", "message"),
    [
        ("PPCCTHHSTT", (0,), "history begins every row but the first, and nothing else; broken first at token 5"),
        ("PPCCTHHSTT", (0, 6), "history begins every row but the first, and nothing else; broken first at token 5"),
        ("PPCCTSHSTT", (0, 5), "history begins every row but the first, and nothing else; broken first at token 5"),
        ("PPCCTHHSTT", (5,), "must rise from 0"),
        ("PPCCTHHSTT", (), "must rise from 0"),
        ("PPCCTHHSTT", (0, 5, 5), "must rise from 0"),
        ("PPCCTHHSTT", (0, 10), "stay below 10"),
        ("PPCCTHHSTT", (0, 5, 6), "row 1 of 3 holds no sampled token"),
        ("PPCCTHHSTT", (0, 1), "row 0 of 2 holds no sampled token"),
    ],
)
def test_rows_that_cannot_be_are_refused(kinds: str, row_starts: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trajectory(**fields(kinds=kinds, row_starts=row_starts))


def changed(name: str, index: int, value: Any) -> dict[str, Any]:
    array = fields()[name].copy()
    array[index] = value
    return {name: array}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (changed("sampled", 6, True), "token 6"),
        (changed("sampled", 2, False), "token 2"),
        (changed("kind", 6, TokenKind.TEXT), "token 6"),
        (changed("kind", 3, TokenKind.TOOL_OUTPUT), "token 3"),
        (changed("logprobs", 5, -1), "log-prob 0"),
        (changed("logprobs", 2, np.nan), "finite"),
        (changed("logprobs", 2, -np.inf), "finite"),
        (changed("logprobs", 2, 0.1), "not positive"),
        (changed("turn", 1, 1), "prompt"),
        (changed("turn", 5, 0), "prompt"),
        (changed("turn", 9, 1), "never go back"),
        (changed("token_ids", 0, -1), "negative"),
        ({"token_ids": np.arange(9, dtype=np.int32)}, r"expected bool\(9,\)"),
        ({"token_ids": np.arange(10)}, "int64"),
        ({"turns": (TurnRecord(2, 5, ""),)}, "exactly the sampled tokens"),
        ({"turns": (TurnRecord(2, 5, ""), TurnRecord(7, 10, ""))}, "exactly the sampled tokens"),
        ({"turns": (TurnRecord(2, 5, ""), TurnRecord(8, 11, ""))}, r"\[8, 11\)"),
        ({"turns": (TurnRecord(2, 10, ""),)}, "later turn"),
        ({"turns": (TurnRecord(2, 5, "", calls=(CallRecord("f", "", 4, 6, ""),)), TurnRecord(8, 10, ""))}, "outside"),
    ],
)
def test_a_wrong_one_is_refused_with_the_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Trajectory(**fields(**changes))
    assert "t/e" in str(error.value)


def test_a_row_is_json_and_reads_back_the_same() -> None:
    trajectory = Trajectory(**fields(scores={"a": 0.5}, drift=0, grade_reason="né"))
    row = json.loads(json.dumps(trajectory.to_row()))
    again = Trajectory.from_row(row)
    assert again.to_row() == trajectory.to_row()
    for field in dataclasses.fields(Trajectory):
        value, read = getattr(trajectory, field.name), getattr(again, field.name)
        assert np.array_equal(value, read) if isinstance(value, np.ndarray) else value == read


def test_errors_keep_their_kind_through_a_row() -> None:
    call = CallRecord(None, "{", 2, 4, "{}", ToolErrorKind.INVALID_JSON)
    turns = (TurnRecord(2, 5, "x", calls=(call,)), TurnRecord(8, 10, "y"))
    again = Trajectory.from_row(Trajectory(**fields(turns=turns)).to_row())
    assert again.calls[0].error is ToolErrorKind.INVALID_JSON


def test_an_episode_without_a_turn_is_possible() -> None:
    prompt = {name: fields()[name][:2] for name in ("token_ids", "sampled", "kind", "turn", "logprobs")}
    values = fields(**prompt, turns=(), answer=None, correct=False, stop_reason=StopReason.EPISODE_LENGTH)
    assert Trajectory(**values).num_sampled == 0


def test_only_answers_and_stop_tools_terminate() -> None:
    assert {reason for reason in StopReason if reason.terminated} == {StopReason.ANSWER, StopReason.STOP_TOOL}
