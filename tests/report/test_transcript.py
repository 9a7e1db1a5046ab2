"""Transcripts show every token once, by kind, and hide nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.report.transcript import MOST_CHARACTERS, choose_examples, shorten, transcript, visible
from opd_env.tools import ToolErrorKind
from tests.episode.trajectory_samples import Call, decode, make_trajectories, make_trajectory

GOOD = Call("calculator", '{"expression": "6*7"}', "42")
BAD = Call("calculator", '{"expression": "1/0"}', "division by zero", ToolErrorKind.EXCEPTION)


def test_the_pieces_together_are_the_whole_conversation() -> None:
    for trajectory in make_trajectories(20, 0.5):
        passages = [passage.text for block in transcript(trajectory, decode) for passage in block.passages]
        assert "".join(passages).replace("↵", "\n") == decode(trajectory.token_ids)


def test_blocks_follow_the_turns_and_kinds_follow_the_tokens() -> None:
    blocks = transcript(make_trajectory(turns=[["Hm. ", GOOD], ["It is 42."]]), decode)
    assert [(block.role, block.turn) for block in blocks] == [
        ("prompt", 0), ("student", 1), ("tools", 1), ("student", 2),
    ]  # fmt: skip
    kinds = [list(dict.fromkeys(passage.kind for passage in block.passages)) for block in blocks]
    assert kinds == [["prompt"], ["text", "tool_call"], ["scaffold", "tool_output"], ["text"]]
    outputs = [passage.text for passage in blocks[2].passages if passage.kind == "tool_output"]
    assert outputs == ["42"]


def test_sampled_tokens_carry_their_logprob_and_context_none() -> None:
    trajectory = make_trajectory()
    blocks = transcript(trajectory, decode)
    assert blocks[0].passages[0].note == ""
    first = trajectory.turns[0].start
    assert blocks[1].passages[0].note == f"student log-prob {trajectory.logprobs[first]:.2f}"
    assert len(blocks[1].passages) == trajectory.num_sampled


def test_the_teachers_opinion_is_added_where_it_is_known() -> None:
    trajectory = make_trajectory()
    ratio = np.where(trajectory.sampled, np.float32(0.5), np.float32(0))
    passage = transcript(trajectory, decode, ratio)[1].passages[0]
    assert passage.log_ratio == 0.5
    assert "teacher" in passage.note


def test_tokens_that_make_a_character_together_are_one_piece() -> None:
    texts = [passage.text for passage in transcript(make_trajectory(turns=[["a🧮é"]]), decode)[1].passages]
    assert texts == ["a", "🧮", "é", "<|im_end|>"]


def test_bytes_that_are_no_text_stay_single_tokens() -> None:
    trajectory = make_trajectory(turns=[["xyz"]])
    trajectory.token_ids[trajectory.turns[0].start] = 0xFF
    passages = transcript(trajectory, decode)[1].passages
    assert [passage.text for passage in passages] == ["\ufffd", "y", "z", "<|im_end|>"]


def test_errors_of_a_turn_are_named_on_the_tools_block() -> None:
    blocks = transcript(make_trajectory(turns=[[BAD, GOOD], ["Done."]]), decode)
    assert [block.errors for block in blocks] == [(), (), ("exception",), ()]


def test_retries_of_a_turn_are_counted_on_the_tools_block() -> None:
    trajectory = make_trajectory(turns=[[replace(BAD, retries=2), replace(GOOD, retries=1)], ["Done."]])
    for way in (decode, None):
        assert [block.retries for block in transcript(trajectory, way) if block.role == "tools"] == [3]


def test_without_a_tokenizer_the_records_are_shown() -> None:
    blocks = transcript(make_trajectory(turns=[["<think>so</think>Hm. ", GOOD], ["It is 42."]]))
    assert [block.role for block in blocks] == ["student", "tools", "student"]
    assert [(passage.kind, passage.text) for passage in blocks[0].passages] == [
        ("thinking", "<think>so</think>"),
        ("text", "Hm. "),
        ("tool_call", GOOD.block),
    ]
    assert blocks[1].passages[0].text == "42\n"


@pytest.mark.parametrize(
    "character", ["\x00", "\x1b", "\r", "\x7f", "\x85", "\u200b", "\u202e", "\u2066", "\ufeff", "\ud800"]
)
def test_characters_that_hide_or_reorder_are_written_out(character: str) -> None:
    assert visible(f"a{character}b") == f"a⟦U+{ord(character):04X}⟧b"


@given(st.text())
def test_what_is_visible_stays_and_can_be_encoded(text: str) -> None:
    shown = visible(text)
    shown.encode()
    assert visible(shown) == shown
    if text.isascii() and text.replace("\n", "").isprintable():
        assert shown == text


def test_long_texts_are_cut_and_say_so() -> None:
    assert shorten("x" * (MOST_CHARACTERS + 1500)) == "x" * MOST_CHARACTERS + " … 1,500 more characters"
    assert shorten("x" * MOST_CHARACTERS) == "x" * MOST_CHARACTERS
    blocks = transcript(make_trajectory(turns=[[Call("python", "{}", "y" * 9999)], ["ok"]]), decode)
    assert max(len(passage.text) for passage in blocks[2].passages) < MOST_CHARACTERS + 50


def test_examples_show_learnt_lost_and_unchanged_problems() -> None:
    before = {"a": True, "b": False, "c": False, "d": True, "e": False, "f": False, "g": False, "x": True}
    after = {"a": True, "b": True, "c": True, "d": False, "e": False, "f": True, "g": True}
    six = choose_examples(before, after, 6)
    assert {"a", "d", "e"} < set(six)  # still right, lost, still wrong
    assert len(set(six) & {"b", "c", "f", "g"}) == 3  # learnt
    assert six == sorted(six)
    assert "d" in choose_examples(before, after, 2)
    assert choose_examples(before, after, 99) == list(after)


def test_examples_of_one_model_are_right_and_wrong_ones() -> None:
    chosen = choose_examples({}, {str(i): i % 5 == 0 for i in range(20)}, 6)
    assert len(chosen) == 6
    assert {int(key) % 5 == 0 for key in chosen} == {True, False}
    assert choose_examples({}, {}, 6) == []
