"""Whatever JSON a server answers: it is read as what was asked for, or it is an answer that failed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.engines.base import GREEDY, Request, SamplingParams
from opd_env.engines.servers.client import HttpClient, RequestFailed
from opd_env.engines.servers.protocol import ServedModel, read_completion, score_tokens
from opd_env.engines.servers.transport import Transport
from opd_env.evaluation.chat_server import ChatServer, ServerFault

REQUEST, STOP, VOCAB = Request(0, [5, 6], SamplingParams(max_tokens=3)), (2,), 32
TURN = {
    "choices": [
        {
            "token_ids": [7, 8, 2], "prompt_token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0, -2.0, -0.5]},
            "finish_reason": "stop",
        }
    ]
}  # fmt: skip
ENTRY = {"6": {"logprob": -1.0}, "7": {"logprob": -1.5}}
SCORES = {"choices": [{"prompt_token_ids": [5, 6], "prompt_logprobs": [None, ENTRY]}]}
CALL = {"id": "a", "function": {"name": "f", "arguments": "{}"}}
CHAT = {
    "choices": [{"message": {"content": "x", "tool_calls": [CALL]}, "finish_reason": "stop"}],
    "usage": {"total_tokens": 7},
}
LEAF = (
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=4)
    | st.sampled_from([10**400, -(10**400), -9999.0, "5", "٧", "\ud83d", "stop", "length"])
)  # fmt: skip
VALUE = st.recursive(
    LEAF, lambda one: st.lists(one, max_size=4) | st.dictionaries(st.text(max_size=3), one, max_size=3)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(one, (*path, key))


@st.composite
def spoilt(draw: st.DrawFn, answer: Any) -> Any:
    """The answer with one or two of its parts replaced, renamed, left out or doubled."""
    answer = copy.deepcopy(answer)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(answer))))
        if not path:
            return draw(VALUE)
        parent = answer
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "rename", "leave out", "double"]))
        old = parent[path[-1]] if how == "replace" else parent.pop(path[-1])
        if how == "replace":
            parent[path[-1]] = draw(VALUE)
        elif how != "leave out" and isinstance(parent, dict):
            parent[draw(st.text(max_size=3) | st.sampled_from(["5", "06", "-7", "9" * 30]))] = old
        elif how == "double":
            parent += [old, old]
    return answer


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every server answers the last of these; what JSON cannot carry has been left out."""
    answers: list[Any] = []
    monkeypatch.setattr(Transport, "ask", lambda *_, **__: json.loads(json.dumps(answers[-1])))
    return answers


def test_a_turn_is_sampled_or_failed(answering: list[Any]) -> None:
    client = HttpClient(["http://h:1"], tries=1)

    @given(spoilt(TURN))
    def check(answer: Any) -> None:
        answering.append(answer)
        try:
            found = client.post("/v1/completions", {}, lambda one: read_completion(one, REQUEST, STOP, VOCAB))
        except RequestFailed:
            client.__post_init__()  # healthy again
            return
        assert all(type(token) is int and 0 <= token < VOCAB for token in found.token_ids)
        assert all(type(one) is float and -9999 < one <= 0 for one in found.logprobs)
        assert len(found.token_ids) == len(found.logprobs) <= 3
        assert found.truncated == (found.token_ids[-1] not in STOP)

    check()


def test_a_row_is_scored_or_failed(answering: list[Any]) -> None:
    client = HttpClient(["http://h:1"], tries=1)

    @given(spoilt(SCORES), st.sampled_from([0, 1, 2]))
    def check(answer: Any, k: int) -> None:
        answering.append(answer)
        try:
            found = score_tokens(client, ServedModel("m", 99), [5, 6], [1], k)
        except RequestFailed:
            client.__post_init__()
            return
        assert found.logprobs_N.shape == (1,)
        assert found.topk_ids_NK.shape == found.topk_logprobs_NK.shape == (1, k)
        assert found.logprobs_N[0] <= 0
        assert (found.topk_logprobs_NK <= 0).all()
        assert (found.topk_ids_NK >= 0).all()
        assert np.exp(found.topk_logprobs_NK.astype(float)).sum() <= 1.01

    check()


def test_a_chat_turn_is_a_reply_or_a_fault(answering: list[Any]) -> None:
    server = ChatServer("http://h:1/v1", "m", tries=1)

    @given(spoilt(CHAT))
    def check(answer: Any) -> None:
        answering.append(answer)
        try:
            found = server.complete([], [], GREEDY)
        except ServerFault:
            return
        assert isinstance(found.text, str)
        assert all(isinstance(part, str) for call in found.calls for part in call)
        assert type(found.total_tokens) is int

    check()
