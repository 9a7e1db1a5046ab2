"""Episodes through a chat server: exact calls, the same limits and grades, and nothing that is made up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.cli import main
from opd_env.engines.base import SamplingParams, ScriptedEngine
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.store import load_trajectories
from opd_env.episode.trajectory import StopReason
from opd_env.evaluation.chat_player import _action, _safe_names
from opd_env.evaluation.chat_server import ChatServer, NativeCall, Reply, ServerRefused
from opd_env.evaluation.comparison import compare, read_side
from opd_env.evaluation.result import EvaluationResult
from opd_env.evaluation.run import evaluate
from opd_env.formats import parse_hermes
from opd_env.messages import user
from opd_env.plugins.exports import export_evaluation
from opd_env.report.comparison_page import write_comparison
from opd_env.report.page import write_report
from opd_env.tools import ToolErrorKind
from tests.episode.test_user_turns import Talk
from tests.evaluation.chat_api import Answer, chat_api, says
from tests.evaluation.test_run import Doubles

sent: list[dict[str, Any]] = []
"""The requests of the latest ``run``."""
used_port: list[int] = []
"""The port of the latest ``run``: a folder belongs to one server."""
Respond = Callable[[dict[str, Any], int], Answer]


def number_in(body: dict[str, Any]) -> int:
    question = next(m["content"] for m in body["messages"] if m["role"] == "user")
    return int(question.split("Double ")[1].split("?")[0])


def good(body: dict[str, Any], number: int) -> Answer:
    """Calls the calculator, then answers with what it said."""
    if body["messages"][-1]["role"] == "tool":
        return says(f"The answer is {body['messages'][-1]['content']}.")
    return says(None, ("calculator", json.dumps({"expression": f"2*{number_in(body)}"})))


def run(respond: Respond, **options: Any) -> EvaluationResult:
    settings = {"pause_s": 0.001, "tries": 3, "concurrency": 4} | options.pop("server", {})
    with chat_api(respond, port=options.pop("port", 0)) as api:
        used_port[:] = [api.port]
        server = ChatServer(api.url, "m", **settings)
        try:
            return evaluate(options.pop("task", Doubles(6)), server, model="m", **options)
        finally:
            sent[:] = api.requests


def test_a_server_plays_the_same_episodes_as_any_model() -> None:
    result = run(good)
    assert (result.summary.accuracy.value, result.summary.tool_call_validity.value) == (1, 1)
    assert [one.example_id for one in result.trajectories] == [f"d{i}" for i in range(6)]
    (call,) = result.trajectories[3].calls
    assert (call.name, json.loads(call.arguments), call.output, call.error) == (
        "calculator",
        {"expression": "2*3"},
        "6",
        None,
    )
    assert result.settings["chat_format"] == "chat completions"
    assert result.label == "doubles (with tools: calculator)"


def test_nothing_is_made_up_about_tokens() -> None:
    result = run(good)
    assert all(len(one.token_ids) == 0 and one.num_sampled == 0 for one in result.trajectories)
    flat = result.summary.to_json()
    assert flat["sampled_tokens_per_episode"] is None
    assert flat["tokens_per_episode"] is None
    assert flat["turns_per_episode"] == 2


def test_reports_comparisons_and_exports_read_episodes_without_tokens(tmp_path: Path) -> None:
    run(good, folder=tmp_path / "a")
    run(lambda body, number: says("The answer is 0."), folder=tmp_path / "b")
    page = write_report(tmp_path / "a").read_text()
    assert "played as text" in page
    assert "tool_call" in page
    comparison = compare(read_side(tmp_path / "b"), read_side(tmp_path / "a"))
    assert (len(comparison.gained), len(comparison.lost)) == (5, 0)
    write_comparison([comparison], tmp_path / "page.html")
    (log,) = export_evaluation(tmp_path / "a", "inspect", tmp_path / "out")
    assert json.loads(log.read_text())["samples"][0]["metadata"]["sampled_tokens"] is None


def test_the_server_gets_its_own_calls_back_with_their_answers() -> None:
    run(good, limit=1)
    asked = sent[1]["messages"]
    assert [message["role"] for message in asked] == ["user", "assistant", "tool"]
    assert asked[1]["tool_calls"][0]["id"] == asked[2]["tool_call_id"] == "id-0"
    assert asked[2]["content"] == "0"


def test_calls_that_the_server_left_in_the_text_are_run_and_answered_as_text() -> None:
    def respond(body: dict[str, Any], number: int) -> Answer:
        if "<tool_response>" in body["messages"][-1]["content"]:
            return says("The answer is 0.")
        return says('<tool_call>\n{"name": "calculator", "arguments": {"expression": "0*2"}}\n</tool_call>')

    result = run(respond, limit=1)
    assert result.summary.tool_call_validity.value == 1
    assert sent[1]["messages"][-1]["role"] == "user"


def test_a_user_who_speaks_again_is_heard_and_recorded() -> None:
    result = run(lambda body, number: says("no" if number == 0 else "yes"), task=Talk())
    (one,) = result.trajectories
    assert [turn.user for turn in one.turns] == ["And now?", None]
    assert (one.stop_reason, one.correct) == (StopReason.ANSWER, True)
    assert sent[1]["messages"] == [user("Well?"), {"role": "assistant", "content": "no"}, user("And now?")]


def test_unreadable_arguments_are_counted_and_never_sent_back() -> None:
    def respond(body: dict[str, Any], number: int) -> Answer:
        if body["messages"][-1]["role"] == "tool":
            return says("The answer is 0.")
        return says(None, ("calculator", '{"expression": '), ("calculator", '["x"]'), ("calculater", "{}"))

    result = run(respond, limit=1)
    assert [call.error for call in result.trajectories[0].calls] == [
        ToolErrorKind.INVALID_JSON, ToolErrorKind.NOT_AN_OBJECT, ToolErrorKind.UNKNOWN_TOOL,
    ]  # fmt: skip
    calls = sent[1]["messages"][1]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ["{}", "{}", "{}"]
    assert len(sent[1]["messages"]) == 5


def test_calls_of_a_turn_that_was_cut_are_not_run() -> None:
    result = run(lambda body, number: says(None, ("calculator", '{"expression": "1"}'), finish="length"), limit=1)
    (one,) = result.trajectories
    assert (one.stop_reason, one.calls, one.correct) == (StopReason.TURN_LENGTH, (), False)
    assert one.turns[0].truncated


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (RolloutLimits(max_turns=2), StopReason.MAX_TURNS),
        (RolloutLimits(max_tool_calls=2), StopReason.MAX_TOOL_CALLS),
        (RolloutLimits(max_tokens=256), StopReason.EPISODE_LENGTH),
        (RolloutLimits(max_seconds=1e-6), StopReason.TIME),
    ],
)
def test_limits_end_an_episode_that_never_answers(limits: RolloutLimits, reason: StopReason) -> None:
    def respond(body: dict[str, Any], number: int) -> Answer:
        return says(None, ("calculator", '{"expression": "1+1"}'), total_tokens=100 * len(body["messages"]))

    (one,) = run(respond, limit=1, limits=limits).trajectories
    assert (one.stop_reason, one.correct) == (reason, False)


def test_a_full_context_ends_the_episode_and_not_the_evaluation() -> None:
    full = Answer({"error": {"code": "context_length_exceeded"}}, 400)
    result = run(lambda body, number: full if number_in(body) == 2 else good(body, number))
    assert result.summary.stop_reasons["episode_length"] == 1
    assert result.summary.accuracy.value == pytest.approx(5 / 6)


def test_waiting_for_a_busy_server_is_not_the_models_time() -> None:
    def respond(body: dict[str, Any], number: int) -> Answer:
        return Answer({}, 429, {"Retry-After": "0.4"}) if number == 0 else good(body, number)

    (one,) = run(respond, limit=1, limits=RolloutLimits(max_seconds=0.35)).trajectories
    assert (one.stop_reason, one.correct) == (StopReason.ANSWER, True)


def test_an_episode_that_the_server_fails_is_counted_and_played_by_the_next_run(tmp_path: Path) -> None:
    def flaky(body: dict[str, Any], number: int) -> Answer:
        return Answer(b"garbage") if number_in(body) == 4 else good(body, number)

    first = run(flaky, folder=tmp_path)
    assert (first.summary.n, [error.example_id for error in first.errors]) == (5, ["d4"])
    assert "failed 3 times" in first.errors[0].message
    second = run(good, folder=tmp_path, port=used_port[0])
    assert (second.summary.n, second.errors) == (6, [])
    assert len(sent) == 2  # one episode of two turns
    assert len(load_trajectories(tmp_path)) == 6


def test_a_server_that_is_down_ends_the_evaluation_and_keeps_what_finished(tmp_path: Path) -> None:
    def dies(body: dict[str, Any], number: int) -> Answer:
        return good(body, number) if number < 8 else Answer(b"", 503)

    with pytest.raises(ServerRefused, match=r"episodes in a row failed; .*HTTP 503"):
        run(dies, task=Doubles(40), folder=tmp_path, server={"concurrency": 2})
    kept = len(load_trajectories(tmp_path))
    assert 1 <= kept <= 4
    assert run(good, task=Doubles(40), folder=tmp_path, port=used_port[0]).summary.n == 40


def test_what_finished_beside_a_refusal_is_kept(tmp_path: Path) -> None:
    def respond(body: dict[str, Any], number: int) -> Answer:
        return Answer({}, 401, delay=1.0) if number_in(body) == 1 else good(body, number)

    with pytest.raises(ServerRefused):
        run(respond, folder=tmp_path, limit=2)
    assert [one.example_id for one in load_trajectories(tmp_path)] == ["d0"]


def test_an_evaluation_that_is_stopped_waits_for_no_answer() -> None:
    before = set(threading.enumerate())

    def stop(body: dict[str, Any], number: int) -> Answer:
        return Answer({}, 401) if number == 0 else Answer({}, delay=200)

    started = time.monotonic()
    with pytest.raises(ServerRefused):
        run(stop)
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("opd-env-chat"):
            thread.join(60)
    assert time.monotonic() - started < 60


def test_a_wrong_key_ends_at_once() -> None:
    with pytest.raises(ServerRefused, match="HTTP 401"):
        run(lambda body, number: Answer({}, 401), task=Doubles(40), server={"concurrency": 1})
    assert 1 <= len(sent) <= 2  # the next episode may have begun


def test_samples_have_seeds_of_their_own() -> None:
    run(good, limit=2, samples=3, sampling=SamplingParams(temperature=1.0))
    seeds = [body["seed"] for body in sent]
    assert len(set(seeds)) == len(seeds) == 12


def test_names_that_the_api_does_not_accept_are_translated_both_ways() -> None:
    schemas = [{"function": {"name": name}} for name in ("math.sqrt", "math_sqrt", "x" * 80, "x" * 81)]
    names = _safe_names(schemas)
    assert names["math.sqrt"] == "math_sqrt"
    assert len(set(names.values())) == 4
    assert all(len(name) <= 64 for name in names.values())
    reply = Reply("", (NativeCall("1", "math_sqrt", "{}"),), False, 0)
    (call,) = parse_hermes(_action(reply, {safe: name for name, safe in names.items()})).calls
    assert call.name == "math.sqrt"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
TEXT = st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<think>", "</think>", "{", "}", '"', "\n", "a"])).map(
    "".join
)


@given(
    TEXT, st.lists(st.tuples(st.text(min_size=1), st.dictionaries(st.text(), JSON, max_size=3)), min_size=1, max_size=3)
)
def test_any_call_survives_the_way_through_text(text: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    reply = Reply(text, tuple(NativeCall("", name, json.dumps(arguments)) for name, arguments in calls), False, 0)
    turn = parse_hermes(_action(reply, {}))
    assert [(call.name, call.arguments, call.error) for call in turn.calls] == [(*call, None) for call in calls]
    assert turn.thinking == ()


@given(TEXT, st.lists(st.text() | TEXT, min_size=1, max_size=3))
def test_arguments_of_any_text_make_exactly_their_calls(text: str, arguments: list[str]) -> None:
    reply = Reply(text, tuple(NativeCall("", "f", one) for one in arguments), False, 0)
    calls = parse_hermes(_action(reply, {})).calls
    assert len(calls) == len(arguments)
    for call, one in zip(calls, arguments, strict=True):
        try:
            readable = isinstance(json.loads(one), dict)
        except ValueError:
            readable = False
        assert readable or call.error is not None


def test_the_command_takes_a_servers_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def respond(body: dict[str, Any], number: int) -> Answer:
        return says("The answer is 3.")

    with chat_api(respond, models=("org/model-x",)) as api:
        words = ["eval", "--model", api.url, "--task", "arithmetic", "--problems", "3", "--output", str(tmp_path)]
        assert main(words) == 0
    assert "org/model-x arithmetic" in " ".join(capsys.readouterr().out.split())
    (folder,) = (tmp_path / "org_model-x").iterdir()
    assert json.loads((folder / "results.json").read_text())["evaluation"]["n"] == 3


def test_a_folder_is_not_continued_with_another_server(tmp_path: Path) -> None:
    with chat_api(good) as one, chat_api(good) as other:
        evaluate(Doubles(2), ChatServer(one.url, "m"), model="m", folder=tmp_path)
        with pytest.raises(ValueError, match="server was 'http://127"):
            evaluate(Doubles(2), ChatServer(other.url, "m"), model="m", folder=tmp_path)


def test_an_engine_without_a_chat_format_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the chat format"):
        evaluate(Doubles(2), ScriptedEngine(lambda request, turn: [], [0]))
