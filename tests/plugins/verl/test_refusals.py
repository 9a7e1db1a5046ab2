"""What must not be learnt from: settings that are refused, and episodes that fail by no fault of the student."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl", reason="needs verl: make test-verl")


from opd_env.errors import UserError
from opd_env.formats import get_format
from opd_env.messages import assistant
from opd_env.plugins.verl.examples import example_rows
from tests.formats.families import family_tokenizer
from tests.plugins.verl.verl_worker import (
    CHAT,
    ROWS,
    Server,
    call,
    distilling,
    expected,
    failing,
    play,
    verl_config,
)


@pytest.mark.parametrize("changes", [{"top_p": 0.9}, {"top_k": 50}, {"temperature": 0.7}])
def test_distilling_from_a_truncated_distribution_is_refused(config: Any, changes: dict[str, float]) -> None:
    play(config, Server(), ROWS[:1])
    config = distilling(config, "opd_plus_jsd")
    config.actor_rollout_ref.rollout.update(changes)
    error = failing(config, teacher=Server())
    assert isinstance(error, UserError)
    assert "whole distribution" in str(error)


def test_a_prompt_that_is_too_long_is_an_error_and_never_cut(config: Any) -> None:
    config = config.copy()
    config.actor_rollout_ref.rollout.prompt_length = expected(0).turns[0].start - 1
    server = Server()
    error = failing(config, server=server)
    assert isinstance(error, UserError)
    assert f"has {expected(0).turns[0].start} tokens" in str(error)
    assert "data.max_prompt_length" in str(error)
    assert not server.requests


@pytest.mark.parametrize("changes", [{"id": "double-9"}, {"version": "0"}])
def test_a_data_file_of_another_version_of_the_task_is_refused(config: Any, changes: dict[str, str]) -> None:
    row = {**ROWS[3], "extra_info": {**ROWS[3]["extra_info"], **changes}}
    error = failing(config, row)
    assert isinstance(error, UserError)
    assert "write the data file again" in str(error)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"token_ids": [], "stop_reason": "aborted"}, "gave a turn up"),
        ({"token_ids": [65, 66], "log_probs": [-1.0, -1.0]}, "ended a turn after 2 of"),
        ({"token_ids": [65] * 1501, "log_probs": [-1.0] * 1501}, "ended a turn after 1501 of"),
        ({"token_ids": [65] * 1500, "log_probs": [-1.0]}, "1500 tokens .* 1 log-probs"),
        ({"token_ids": [65] * 1500, "log_probs": [float("nan")] * 1500}, "log-prob is finite"),
    ],
)
def test_what_a_server_must_not_answer_fails_the_episode(config: Any, answer: dict[str, Any], message: str) -> None:
    error = failing(config, server=Server(lambda ids, params: answer))
    assert re.search(message, str(error))


def test_a_tool_that_fails_by_itself_fails_the_episode_and_nothing_is_learnt(config: Any) -> None:
    turn = CHAT.render_assistant(assistant(call("broken", "{}")))
    server = Server(lambda ids, params: {"token_ids": turn, "log_probs": [-1.0] * len(turn)})
    error = failing(config, server=server)
    assert "'broken' failed by no fault of the student" in str(error)
    assert len(server.requests) == 1


@pytest.mark.parametrize("family", ["Qwen 3", "Qwen 3, not thinking"])
def test_a_template_that_rewrites_what_was_sampled_is_refused(family: str, tmp_path: Path) -> None:
    """Qwen 3 rewrites only where the user speaks again after thinking, which in ``arithmetic`` nobody does."""
    tokenizer = family_tokenizer(family)
    tokenizer.pad_token = "<|endoftext|>"
    config = verl_config(tmp_path, "data.max_prompt_length=2000", tokenizer=tokenizer)
    chat = get_format(tokenizer)
    turn = chat.render_assistant(assistant("The answer is 6."))
    server = Server(lambda ids, params: {"token_ids": turn, "log_probs": [-1.0] * len(turn)})
    error = failing(config, ROWS[1], server)
    assert isinstance(error, UserError)
    assert "rewrites the conversation" in str(error)
    arithmetic = example_rows("arithmetic")[0]
    if family == "Qwen 3":
        assert play(config, server, [arithmetic]).non_tensor_batch["stop_reason"] == ["answer"]
    else:
        assert "rewrites the conversation: tool results" in str(failing(config, arithmetic, server))


def test_arguments_of_the_chat_template_are_refused(config: Any) -> None:
    config = config.copy()
    config.data.apply_chat_template_kwargs = {"enable_thinking": False}
    assert "enable_thinking" in str(failing(config))
