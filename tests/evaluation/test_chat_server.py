"""The client of chat servers: what it sends, and every way in which a server can fail."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from opd_env.engines.base import GREEDY, SamplingParams
from opd_env.engines.servers import transport as http_transport
from opd_env.engines.servers.transport import Fault
from opd_env.evaluation import chat_server
from opd_env.evaluation.chat_server import ChatServer, ContextFull, NativeCall, Reply, ServerFault, ServerRefused
from opd_env.messages import user
from tests.evaluation.chat_api import Answer, chat_api, says
from tests.ports import kept_port

QUESTION = [user("What is 6 * 7?")]
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}


def ask(url: str, params: SamplingParams = GREEDY, **options: Any) -> Reply:
    settings = {"model": "m", "pause_s": 0.001, "tries": 4} | options
    return ChatServer(url, **settings).complete(QUESTION, [TOOL], params)


def test_text_and_calls_come_back_as_the_server_read_them() -> None:
    with chat_api(lambda body, number: says("Let me see.", ("calculator", '{"expression": "6*7"}'))) as api:
        reply = ask(api.url)
    assert reply.text == "Let me see."
    assert reply.calls == (NativeCall("id-0", "calculator", '{"expression": "6*7"}'),)
    assert (reply.truncated, reply.total_tokens) == (False, 20)


def test_the_request_holds_the_sampling_and_the_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    with chat_api(lambda body, number: says("42")) as api:
        ChatServer(api.url, "m").complete(QUESTION, [TOOL], SamplingParams(0.7, max_tokens=33), seed=5)
        ChatServer(api.url, "m").complete(QUESTION, [], GREEDY)
    first, second = api.requests
    assert first == {
        "model": "m", "messages": QUESTION, "temperature": 0.7, "tools": [TOOL], "seed": 5,
        "max_completion_tokens": 33,
    }  # fmt: skip
    assert "tools" not in second
    assert "seed" not in second
    assert api.headers[0]["Authorization"] == "Bearer sk-1"


def test_no_key_is_sent_when_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with chat_api(lambda body, number: says("42")) as api:
        ask(api.url)
    assert "Authorization" not in api.headers[0]


@pytest.mark.parametrize(
    "fault",
    [
        Answer({"error": "slow down"}, 429),
        Answer({"error": "slow down"}, 429, {"Retry-After": "0.01"}),
        Answer({"error": "slow down"}, 429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        Answer(b"oops", 500),
        Answer(b"", 503),
        Answer(b"<html>hello</html>"),
        Answer(b"\xff\xfe\x00"),
        Answer([]),
        Answer({"choices": []}),
        Answer({"choices": [{"message": None}]}),
        Answer({"choices": [{"message": {"content": 7}}]}),
        Answer({"choices": [{"message": {"content": "", "tool_calls": ["x"]}}]}),
        Answer({"choices": [{"message": {"content": "", "tool_calls": [{"function": {"name": None}}]}}]}),
        Answer(b'{"choices": [', headers={"Content-Length": "100"}),
        Answer({}, hang_up=True),
    ],
)
def test_a_fault_that_passes_is_tried_again(fault: Answer) -> None:
    with chat_api(lambda body, number: fault if number < 2 else says("42")) as api:
        assert ask(api.url, timeout_s=1.0).text == "42"
    assert len(api.requests) == 3


@pytest.mark.parametrize(("tokens", "counted"), [("1e999", 0), ("true", 0), ('"7"', 0), ("NaN", 0), ("7", 7)])
def test_a_count_of_tokens_that_is_none_counts_as_none(tokens: str, counted: int) -> None:
    answer = f'{{"choices": [{{"message": {{"content": "42"}}}}], "usage": {{"total_tokens": {tokens}}}}}'
    with chat_api(lambda body, number: Answer(answer.encode())) as api:
        assert ask(api.url).total_tokens == counted


def test_arguments_too_deep_to_be_read_or_written_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(depth: int) -> bytes:
        call = b'{"function": {"name": "f", "arguments": {"x": %s}}}' % (b"[" * depth + b"]" * depth)
        return b'{"choices": [{"message": {"tool_calls": [%s]}}]}' % call

    depth = 100
    with chat_api(lambda body, number: Answer(answers(depth))) as api:
        assert ask(api.url).calls[0].arguments.count("[") == depth
        depth = 100_000
        with pytest.raises(ServerFault, match="not JSON"):
            ask(api.url)
    monkeypatch.setattr(chat_server.json, "dumps", lambda value: (_ for _ in ()).throw(RecursionError()))
    with pytest.raises(Fault, match="no chat completion"):
        chat_server._read_reply(json.loads(answers(1)))


def test_a_fault_that_stays_ends_after_the_tries_and_tells_the_last() -> None:
    with (
        chat_api(lambda body, number: Answer({"error": f"no {number}"}, 500)) as api,
        pytest.raises(ServerFault, match=r"failed 4 times; the last: HTTP 500: .*no 3"),
    ):
        ask(api.url)
    assert len(api.requests) == 4


@pytest.mark.parametrize("answer", [Answer({}, delay=100), Answer({"long": "x" * 400}, drip=0.2)])
def test_a_server_that_is_silent_or_drips_is_left_in_time(answer: Answer) -> None:
    with chat_api(lambda body, number: answer) as api:
        started = time.monotonic()
        with pytest.raises(ServerFault, match=r"timed out|took too long"):
            ask(api.url, timeout_s=0.3, tries=2)
        assert time.monotonic() - started < 40


def test_an_endless_answer_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_server, "LONGEST_ANSWER", 1000)
    with (
        chat_api(lambda body, number: Answer(b" " * 5000)) as api,
        pytest.raises(ServerFault, match="longer than 1000 bytes"),
    ):
        ask(api.url, tries=1)


def test_the_pause_is_no_longer_than_allowed_whatever_the_server_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(http_transport.Transport, "pause", lambda transport, seconds: pauses.append(seconds))
    with chat_api(lambda body, number: Answer({}, 429, {"Retry-After": "86400"}) if number < 1 else says("42")) as api:
        ask(api.url)
    assert [pause for pause in pauses if pause > 1] == [http_transport.LONGEST_PAUSE]


@pytest.mark.parametrize(("status", "hint"), [(401, "set OPENAI_API_KEY"), (404, "no such model"), (400, "bad")])
def test_what_will_not_pass_is_refused_at_once(status: int, hint: str) -> None:
    with (
        chat_api(lambda body, number: Answer({"error": "no such model; bad"}, status)) as api,
        pytest.raises(ServerRefused, match=f"refuses model 'm' with HTTP {status}.*{hint}"),
    ):
        ask(api.url)
    assert len(api.requests) == 1


@pytest.mark.parametrize("answer", [Answer({}, delay=100), Answer({}, 429, {"Retry-After": "50"})])
def test_closing_ends_an_answer_or_a_pause_at_once(answer: Answer) -> None:
    with chat_api(lambda body, number: answer) as api:
        server = ChatServer(api.url, "m")
        threading.Timer(0.3, server.close).start()
        started = time.monotonic()
        with pytest.raises(ServerFault, match=r"failed \d times"):
            server.complete(QUESTION, [], GREEDY)
        assert time.monotonic() - started < 40


def test_the_key_is_neither_shown_nor_carried_to_another_host() -> None:
    with chat_api(lambda body, number: says("42")) as other:
        away = Answer({}, 302, {"Location": f"{other.url}/chat/completions"})
        with chat_api(lambda body, number: away) as api, pytest.raises(ServerRefused, match="HTTP 302"):
            ask(api.url, api_key="sk-1")
    assert other.headers == []
    assert "sk-1" not in repr(ChatServer("http://127.0.0.1:1/v1", "m", "sk-1"))


def test_a_full_context_is_told_apart() -> None:
    error = {"error": {"code": "context_length_exceeded", "message": "maximum context length is 8192 tokens"}}
    with chat_api(lambda body, number: Answer(error, 400)) as api, pytest.raises(ContextFull):
        ask(api.url)


def test_an_older_server_gets_the_older_name_of_the_token_limit() -> None:
    def respond(body: dict[str, Any], number: int) -> Answer:
        if "max_completion_tokens" in body:
            return Answer({"error": "unknown field max_completion_tokens"}, 400)
        return says("42")

    with chat_api(respond) as api:
        assert ask(api.url, SamplingParams(max_tokens=9)).text == "42"
    assert api.requests[-1]["max_tokens"] == 9


def test_shapes_that_servers_write_otherwise_are_read() -> None:
    parts = {"content": [{"type": "text", "text": "4"}, {"type": "image"}, {"type": "text", "text": "2"}]}
    loose = {
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g"}}],
    }
    answers = [{"choices": [{"message": parts}]}, {"choices": [{"message": loose, "finish_reason": "length"}]}]
    with chat_api(lambda body, number: Answer(answers[number])) as api:
        assert ask(api.url).text == "42"
        reply = ask(api.url)
    assert reply.calls == (NativeCall("call_0", "f", '{"a": 1}'), NativeCall("call_1", "g", "{}"))
    assert (reply.truncated, reply.total_tokens) == (True, 0)


def test_the_only_model_is_found_and_several_must_be_named() -> None:
    with chat_api(lambda body, number: says("42"), models=("only",)) as api:
        assert ChatServer(api.url).model == "only"
    with (
        chat_api(lambda body, number: says("42"), models=("a", "b")) as api,
        pytest.raises(ServerRefused, match="serves 2 models; name one of a, b"),
    ):
        ChatServer(api.url)


def test_nobody_there_is_one_sentence() -> None:
    with kept_port() as port:
        url = f"http://127.0.0.1:{port}/v1"
        with pytest.raises(ServerRefused, match=r"cannot ask .*/models"):
            ChatServer(url)
        with pytest.raises(ServerFault, match="failed 4 times"):
            ask(url)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ServerRefused, match="no URL of a server"):
        ask("nonsense")
