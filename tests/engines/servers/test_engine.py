"""Sampling on servers: the same contract as the local engine, whatever servers do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_env.engines.base import GREEDY, Request, SamplingParams
from opd_env.engines.local import LocalEngine
from opd_env.engines.servers import client as http_client
from opd_env.engines.servers.client import HttpClient, ServersDown
from opd_env.engines.servers.engine import HttpEngine
from opd_env.engines.servers.protocol import read_completion
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.rollouts import RolloutResult, rollout
from opd_env.errors import UserError
from opd_env.formats import get_format
from tests.engines.fake_vllm import FakeVLLM
from tests.episode.test_rollouts import Doubles
from tests.tiny import tiny_llama, tiny_tokenizer

CHAT = get_format(tiny_tokenizer())
LIMITS = RolloutLimits(max_turns=2, max_turn_tokens=6, max_tokens=200)


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    with FakeVLLM() as one:
        yield one


def engine_of(*servers: FakeVLLM, folder: Path | None = None, **changes: Any) -> HttpEngine:
    options = {"pause_s": 0.01, "timeout_s": 10.0, "patience_s": 5.0, "concurrency": 16, **changes}
    client = HttpClient([server.url for server in servers], **options)
    return HttpEngine(client, CHAT.stop_token_ids, CHAT.vocab_size, folder)


def play(engine: HttpEngine, count: int = 8, seed: int = 1) -> RolloutResult:
    return rollout(Doubles(), engine, CHAT, indices=range(count), limits=LIMITS, seed=seed)


def own_logprobs(model: Any, result: RolloutResult) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = [], []
    for one in result.trajectories:
        with torch.no_grad():
            logprobs_TV = model(torch.tensor(one.token_ids[None])).logits[0].log_softmax(-1)
        places = np.flatnonzero(one.sampled)
        ours += [float(logprobs_TV[place - 1, one.token_ids[place]]) for place in places]
        theirs += one.logprobs[places].tolist()
    return np.array(ours), np.array(theirs)


def test_greedy_turns_equal_those_of_the_local_engine(server: FakeVLLM) -> None:
    prefixes = [list(range(20 + index, 30 + index)) for index in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=7)
    local = LocalEngine(tiny_llama(), CHAT.stop_token_ids, CHAT.vocab_size).generate(prefixes, params)
    served = engine_of(server).generate(prefixes, params)
    assert [one.token_ids for one in served] == [one.token_ids for one in local]
    assert [one.truncated for one in served] == [one.truncated for one in local]
    for ours, theirs in zip(local, served, strict=True):
        np.testing.assert_allclose(theirs.logprobs, ours.logprobs, atol=1e-5)


def test_a_request_leaves_nothing_to_the_servers_defaults(server: FakeVLLM) -> None:
    engine = engine_of(server)
    engine.submit(Request(3, [5, 6], SamplingParams(max_tokens=4), seed=(1 << 64) + 5))
    while engine.busy:
        engine.step()
    (body,) = server.requests
    assert body == {
        "model": "tiny", "prompt": [5, 6], "max_tokens": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": 5, "ignore_eos": True,
        "stop_token_ids": list(CHAT.stop_token_ids), "logprobs": 0, "return_token_ids": True,
        "cache_salt": body["cache_salt"],
    }  # fmt: skip


def test_rollouts_through_faults_equal_those_without(server: FakeVLLM) -> None:
    calm = play(engine_of(server))
    server.faults = ["500", "reset", "garbage", "429:0.01", "truncated", "not json", "503"] * 2
    stormy = play(engine_of(server, tries=20))
    assert not stormy.errors
    for one, other in zip(calm.trajectories, stormy.trajectories, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


def test_a_server_killed_and_restarted_in_the_middle_loses_and_doubles_nothing(server: FakeVLLM) -> None:
    calm = play(engine_of(server), 12)
    server.delay_s = 0.05
    with server.crashing(after_s=0.1, away_s=0.2):
        result = play(engine_of(server, tries=20), 12)
    assert not result.errors
    assert [one.token_ids.tolist() for one in result.trajectories] == [
        one.token_ids.tolist() for one in calm.trajectories
    ]


def test_one_poisoned_turn_ends_its_episode_and_no_other(server: FakeVLLM) -> None:
    def spoil(body: dict[str, Any], choice: dict[str, Any]) -> None:
        if body["seed"] == poisoned:
            choice["token_ids"] = choice["token_ids"][:-1]

    engine = engine_of(server, tries=2)
    calm = play(engine)
    poisoned = server.requests[0]["seed"]
    server.spoil = spoil
    result = play(engine)
    assert len(result.errors) == 1
    assert "failed 2 times" in result.errors[0].message
    assert len(result.trajectories) == len(calm.trajectories) - 1


def test_closing_ends_a_rollout_that_is_under_way_in_another_thread(server: FakeVLLM) -> None:
    server.delay_s = 0.1
    engine, results = engine_of(server, concurrency=2), list[RolloutResult]()
    thread = threading.Thread(target=lambda: results.append(play(engine, 12)), daemon=True)
    thread.start()
    while not server.requests:
        time.sleep(0.01)
    engine.close()
    thread.join(60)
    (result,) = results
    assert len(result.errors) + len(result.trajectories) == 12
    assert any("the client was closed" in error.message for error in result.errors)


def test_no_server_at_all_ends_the_rollout_with_what_to_do(server: FakeVLLM) -> None:
    engine = engine_of(server, patience_s=0.3)
    server.kill()
    with pytest.raises(ServersDown, match="start it"):
        play(engine)
    server.start()


def test_all_turns_are_under_way_at_once_and_spread_over_servers(server: FakeVLLM) -> None:
    server.delay_s = 1.0  # long enough for a busy machine to start all threads
    with FakeVLLM() as second:
        second.delay_s = 1.0
        engine = engine_of(server, second)
        engine.generate([[1 + index, 2] for index in range(16)], GREEDY.__class__(max_tokens=1))
        assert min(len(server.requests), len(second.requests)) >= 3
        assert server.most_at_once + second.most_at_once >= 12


def test_waiting_ends_at_a_wake_and_released_turns_are_thrown_away(server: FakeVLLM) -> None:
    server.delay_s = 5.0
    engine = engine_of(server)
    engine.submit(Request(1, [1, 2], SamplingParams(max_tokens=1)))
    threading.Timer(0.05, engine.wake).start()
    assert engine.step() == [], "it waited for the answer"
    server.delay_s = 0.0
    engine.release(1)
    assert not engine.busy
    engine.submit(Request(1, [3, 4], SamplingParams(max_tokens=2)))
    found = []
    while engine.busy:
        found += engine.step()
    assert [len(one.token_ids) for one in found] == [2]


def test_new_weights_reach_all_servers_and_are_sampled_from(server: FakeVLLM, tmp_path: Path) -> None:
    new = tiny_llama(seed=7, initializer_range=0.3)
    with FakeVLLM() as second:
        engine = engine_of(server, second, folder=tmp_path)
        play(engine)
        engine.update_weights(new)
        ours, theirs = own_logprobs(new, play(engine))
        np.testing.assert_allclose(theirs, ours, atol=1e-4)
        assert server.version == second.version
        assert {request["cache_salt"][-2:] for request in server.requests} == {"-0", "-1"}
        engine.update_weights(new)
        assert [path.name for path in tmp_path.iterdir()] == [server.version]
        engine.close()
        assert not list(tmp_path.iterdir())


def test_a_restarted_server_gets_the_weights_again_before_it_samples(server: FakeVLLM, tmp_path: Path) -> None:
    new = tiny_llama(seed=7, initializer_range=0.3)
    engine = engine_of(server, folder=tmp_path, tries=20)
    engine.update_weights(new)
    server.delay_s = 0.05
    with server.crashing(after_s=0.1, away_s=0.0):
        ours, theirs = own_logprobs(new, play(engine, 12))
    assert server.loads == 2
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_a_process_that_follows_samples_from_the_weights_of_another_and_gives_them_to_a_server_that_returns(
    server: FakeVLLM, tmp_path: Path
) -> None:
    new = tiny_llama(seed=7, initializer_range=0.3)
    with FakeVLLM() as second:
        first, other = (engine_of(server, second, folder=tmp_path, tries=20) for _ in range(2))
        first.update_weights(tiny_llama(seed=5))
        other.follow(first.served)  # type: ignore[arg-type]
        second.kill()
        with other.held():
            first.update_weights(new)
            second.start()  # with its first weights, before the other process has noticed
            waiting = threading.Thread(target=other._restore, args=(second.url,))
            waiting.start()
            time.sleep(0.1)
            assert second.version == "default"
            other.follow(first.served)  # type: ignore[arg-type]
        waiting.join()
        assert second.version == server.version
        ours, theirs = own_logprobs(new, play(other, 12))
        np.testing.assert_allclose(theirs, ours, atol=1e-4)
        other.close()
        assert [path.name for path in tmp_path.iterdir()] == [server.version]
        first.close()


def test_a_server_that_restarted_while_nothing_was_under_way_gets_the_weights_before_it_samples(
    server: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "_IDLE_S", 0.05)
    new = tiny_llama(seed=7, initializer_range=0.3)
    engine = engine_of(server, folder=tmp_path)
    engine.update_weights(new)
    server.kill()
    server.start()
    time.sleep(0.1)
    ours, theirs = own_logprobs(new, play(engine))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert server.loads == 2


def test_a_server_that_is_away_during_an_update_gets_it_when_it_is_back(server: FakeVLLM, tmp_path: Path) -> None:
    new = tiny_llama(seed=7, initializer_range=0.3)
    with FakeVLLM() as second:
        engine = engine_of(server, second, folder=tmp_path, tries=20)
        second.kill()
        engine.update_weights(new)
        second.start()
        time.sleep(0.05)
        for seed in range(3):
            ours, theirs = own_logprobs(new, play(engine, 12, seed))
            np.testing.assert_allclose(theirs, ours, atol=1e-4)
        assert second.version == server.version
        assert second.answered
    server.kill()
    with pytest.raises(UserError, match="no server took the new weights"):
        engine.update_weights(new)
    server.start()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": [7]}, "1 tokens with 2"),
        ({"token_ids": [7, 10_000]}, "not one of"),
        ({"token_ids": [7, True]}, "not one of"),
        ({"token_ids": [7, -1]}, "not one of"),
        ({"token_ids": [7, [[]] * 10**6]}, "not one of"),
        ({"token_ids": "78"}, "not one of"),
        ({"logprobs": {"token_logprobs": [-1.0, 0.5]}}, "not a log-prob"),
        ({"logprobs": {"token_logprobs": [-1.0, None]}}, "not a log-prob"),
        ({"logprobs": {"token_logprobs": [-1.0, float("nan")]}}, "not a log-prob"),
        ({"logprobs": {"token_logprobs": [-1.0, float("-inf")]}}, "not a log-prob"),
        ({"logprobs": {"token_logprobs": [-1.0, -(10**400)]}}, "not a log-prob"),
        ({"logprobs": {"token_logprobs": [-1.0, 10**400]}}, "not a log-prob"),
        ({"logprobs": {"token_logprobs": [-1.0, False]}}, "not a log-prob"),
        ({"logprobs": {"token_logprobs": [-1.0, "x" * 10**6]}}, "not a log-prob"),
        ({"logprobs": {"token_logprobs": [-1.0, -9999.0]}}, "probability 0"),
        ({"prompt_token_ids": [0, 5, 6]}, "another prompt"),
        ({"finish_reason": "abort"}, "ended with"),
        ({"finish_reason": "stop"}, "ended with"),
        ({"token_ids": [7], "logprobs": {"token_logprobs": [-1.0]}}, "broke off"),
    ],
)
def test_answers_that_would_bias_training_are_no_answers(change: dict[str, Any], message: str) -> None:
    request = Request(0, [5, 6], SamplingParams(max_tokens=2))
    choice = {
        "token_ids": [7, 8], "prompt_token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0, -2.0]},
        "finish_reason": "length",
    }  # fmt: skip
    found = read_completion({"choices": [choice]}, request, CHAT.stop_token_ids, CHAT.vocab_size)
    assert found.logprobs == [-1.0, -2.0]
    with pytest.raises(ValueError, match=message) as caught:
        read_completion({"choices": [{**choice, **change}]}, request, CHAT.stop_token_ids, CHAT.vocab_size)
    assert len(str(caught.value)) < 500


def test_what_servers_cannot_do_is_refused_before_it_starts(server: FakeVLLM) -> None:
    engine = engine_of(server)
    with pytest.raises(UserError, match=r"temperature=0\.7"):
        engine.submit(Request(0, [1], SamplingParams(temperature=0.7)))
    with pytest.raises(ValueError, match="context of 1024"):
        engine.submit(Request(0, [1] * 1000, SamplingParams(max_tokens=25)))
    with FakeVLLM(max_model_len=512) as other, pytest.raises(UserError, match="the same model"):
        engine_of(server, other)
    url = server.url
    server.kill()
    with pytest.raises(UserError, match=f"no vLLM server answers at {url}"):
        engine_of(server)
    server.start()
