"""Servers that would bias training are found out; good ones pass."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from opd_env.engines.probe import probe_servers, same_scores
from opd_env.engines.servers import client as http_client
from opd_env.engines.servers.client import HttpClient, RequestFailed, RequestRefused, ServersDown
from opd_env.engines.servers.protocol import ServedModel, read_scores, score_tokens, served_model
from opd_env.errors import UserError
from opd_env.formats import get_format
from tests.engines.fake_vllm import FakeVLLM
from tests.tiny import tiny_llama, tiny_tokenizer

CHAT = get_format(tiny_tokenizer())


def model() -> Any:
    return tiny_llama(initializer_range=0.3)


def probe(server: FakeVLLM, local: Any = None) -> None:
    probe_servers(HttpClient([server.url], pause_s=0.01, timeout_s=10), CHAT, local)


def test_a_good_server_passes_with_and_without_a_local_copy() -> None:
    with FakeVLLM(model) as server:
        probe(server)
        probe(server, model())


def test_a_probe_samples_from_no_prefix_that_an_earlier_one_left_with_other_weights() -> None:
    with FakeVLLM(model) as server:
        salts = []
        for _ in range(2):
            server.requests.clear()
            probe(server)
            salts.append({one["cache_salt"] for one in server.requests if one.get("prompt_logprobs") is None})
    assert [len(one) for one in salts] == [1, 1]
    assert not salts[0] & salts[1]


def without(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda body, choice: choice.update({name: None})


def shifted(body: dict[str, Any], choice: dict[str, Any]) -> None:
    """Scores of the token before: an off-by-one."""
    if choice["prompt_logprobs"]:
        values = [next(iter(entry.values())) for entry in choice["prompt_logprobs"][1:]]
        tokens = body["prompt"][1:]
        choice["prompt_logprobs"][1:] = [{str(t): v} for t, v in zip(tokens, [values[-1], *values[:-1]], strict=True)]


def scaled(body: dict[str, Any], choice: dict[str, Any]) -> None:
    """Sampled log-probs of another temperature."""
    choice["logprobs"]["token_logprobs"] = [value / 2 for value in choice["logprobs"]["token_logprobs"]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("token_ids"), "does not return what is needed"),
        (without("prompt_token_ids"), "does not return what is needed"),
        (without("prompt_logprobs"), "does not return what is needed"),
        (without("logprobs"), "does not return what is needed"),
        (shifted, "sampled and scored log-probs of the same tokens differ"),
        (scaled, "sampled and scored log-probs of the same tokens differ"),
    ],
)
def test_servers_that_answer_wrongly_are_refused(spoil: Any, message: str) -> None:
    with FakeVLLM(model) as server:
        server.spoil = spoil
        with pytest.raises(UserError, match=message):
            probe(server)


def test_stale_scores_of_the_prefix_cache_are_found() -> None:
    with FakeVLLM(model) as server:
        server.stale = True
        with pytest.raises(UserError, match=r"another order.*42019"):
            probe(server)


def test_a_server_that_ignores_the_seed_is_refused() -> None:
    with FakeVLLM(model) as server:
        complete, count = server._choice, iter(range(1000))
        server._choice = lambda body: complete({**body, "seed": next(count)})  # type: ignore[method-assign]
        with pytest.raises(UserError, match="could not be repeated"):
            probe(server)


def test_another_model_than_the_local_one_is_refused() -> None:
    with FakeVLLM(model) as server, pytest.raises(UserError, match="those of the model here differ"):
        probe(server, tiny_llama(seed=3, initializer_range=0.3))


def test_every_server_of_a_pool_is_probed() -> None:
    with FakeVLLM(model) as first, FakeVLLM(model) as second:
        second.spoil = scaled
        with pytest.raises(UserError, match=second.url):
            probe_servers(HttpClient([first.url, second.url], pause_s=0.01), CHAT)


def test_a_pool_whose_servers_hold_different_weights_under_one_name_is_refused() -> None:
    other = FakeVLLM(lambda: tiny_llama(seed=3, initializer_range=0.3))
    with FakeVLLM(model) as first, FakeVLLM(model) as second, other:
        same_scores(HttpClient([first.url, second.url]), CHAT)
        with pytest.raises(UserError, match=rf"{other.url}.* would bias training: its scores and those of {first.url}"):
            same_scores(HttpClient([first.url, other.url]), CHAT)


def test_a_server_that_comes_back_with_other_weights_gets_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_IDLE_S", 0.05)
    with FakeVLLM(model) as server:
        client = HttpClient([server.url], pause_s=0.01, patience_s=0.5)
        client.on_return = same_scores(client, CHAT)
        served, row = ServedModel("tiny", 1024), list(range(30, 50))
        first = score_tokens(client, served, row, [7]).logprobs_N
        server.kill()
        server.start()  # with the same weights, while nothing was under way
        time.sleep(0.1)
        assert score_tokens(client, served, row, [7]).logprobs_N == first
        server.kill()
        server.make_model = lambda: tiny_llama(seed=3, initializer_range=0.3)
        server.start()
        time.sleep(0.1)
        with pytest.raises(ServersDown, match="would bias training: its scores now and at the start differ"):
            score_tokens(client, served, row, [7])
        assert row not in [request["prompt"] for request in server.requests[-3:]]


def test_a_server_whose_model_has_another_name_now_ends_the_request_with_its_words() -> None:
    with FakeVLLM(model) as server:
        client = HttpClient([server.url])
        server.always = "404"  # what vLLM answers to the name of a model that it does not serve
        with pytest.raises(RequestRefused, match="HTTP 404"):
            score_tokens(client, ServedModel("tiny", 1024), range(9), [7])


@pytest.mark.parametrize(
    "listed",
    [
        None, 7, {}, {"data": None}, {"data": "tiny"}, {"data": [7]}, {"data": [{"id": "tiny"}]},
        {"data": [{"id": "tiny", "max_model_len": float("inf")}]}, {"data": [{"id": "tiny", "max_model_len": True}]},
        {"data": [{"id": "tiny", "max_model_len": "1024"}]}, {"data": [{"id": "tiny", "max_model_len": -1}]},
        {"data": [{"id": [[]] * 10**6, "max_model_len": 1024}]},
    ],
)  # fmt: skip
def test_a_list_of_models_that_is_none_is_refused(listed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = HttpClient(["http://h:1"])
    monkeypatch.setattr(client, "ask", lambda *_, **__: listed)
    with pytest.raises(UserError, match="does not list its model and its context") as caught:
        served_model(client)
    assert len(str(caught.value)) < 500


def test_scores_and_likely_tokens_are_those_of_the_model() -> None:
    ids = list(range(30, 50))
    logprobs_TV = model()(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    with FakeVLLM(model) as server:
        client, served = HttpClient([server.url]), ServedModel("tiny", 1024)
        found = score_tokens(client, served, ids, [1, 7, 15], k=4)
        assert server.requests[-1]["prompt"] == ids[:16]  # nothing after the last position is read
        assert not score_tokens(client, served, ids, []).logprobs_N.size
    np.testing.assert_allclose(found.logprobs_N, [logprobs_TV[t - 1, ids[t]] for t in (1, 7, 15)], atol=1e-4)
    for row, t in enumerate((1, 7, 15)):
        top = logprobs_TV[t - 1].topk(4)
        assert found.topk_ids_NK[row].tolist() == top.indices.tolist()
        np.testing.assert_allclose(found.topk_logprobs_NK[row], top.values, atol=1e-4)


def test_forbidden_tokens_score_minus_infinity_and_odd_answers_are_none() -> None:
    entries = [None, {"5": {"logprob": -9999.0}}, {"6": {"logprob": -0.5}}]
    choice = {"prompt_logprobs": entries, "prompt_token_ids": [4, 5, 6]}
    found = read_scores({"choices": [choice]}, [4, 5, 6], [1, 2], 0)
    assert found.logprobs_N.tolist() == [-np.inf, -0.5]
    for bad in (
        {"prompt_logprobs": entries[:2]},
        {"prompt_logprobs": [None, {"7": {"logprob": -1.0}}, entries[2]]},
        {"prompt_logprobs": [None, {"5": {"logprob": 2.0}}, entries[2]]},
        {"prompt_logprobs": [None, {"5": {"logprob": -1.0}, "7": {"logprob": -1.0}}, entries[2]]},
        {"prompt_token_ids": [1, 4, 5, 6]},
        *({"prompt_logprobs": [None, {"5": {"logprob": value}}, entries[2]]} for value in NO_LOGPROBS),
        *({"prompt_logprobs": [None, entry, entries[2]]} for entry in (None, [], {"05": {"logprob": -1.0}})),
        {"prompt_logprobs": {"0": None}},
    ):
        with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
            read_scores({"choices": [{**choice, **bad}]}, [4, 5, 6], [1, 2], 0)


NO_LOGPROBS = [math.nan, math.inf, -math.inf, 10**400, -(10**400), True, None, "-1", [], 0.1]


@pytest.mark.parametrize(
    "entry",
    [
        {"5": -1.0, "7": -1.5, "8": -3.0, "9": -4.0},  # more than were asked for
        {"5": -0.5, "7": -0.6},  # together likelier than 1
        {"5": -1.0, "7": -1.5, "8": -3.0},  # the token is likely, and yet the odd one
        {"5": -1.0, "-7": -1.5},
        {"5": -1.0, "7 ": -1.5},
        {"5": -1.0, "٧": -1.5},
        {"5": -1.0, "9" * 4000: -1.5},
        {"5": -1.0, "": -1.5},
    ],
)
def test_likely_tokens_that_cannot_be_are_refused(entry: dict[str, float]) -> None:
    choice = {
        "prompt_logprobs": [None, {token: {"logprob": one} for token, one in entry.items()}],
        "prompt_token_ids": [4, 5],
    }
    with pytest.raises((ValueError, LookupError)):
        read_scores({"choices": [choice]}, [4, 5], [1], 2)


@pytest.mark.parametrize("logprob", [-1.5, -3.0])
def test_a_token_beyond_the_likely_ones_is_not_among_them(logprob: float) -> None:
    entry = {"5": {"logprob": logprob}, "7": {"logprob": -1.5}, "8": {"logprob": -1.0}}
    choice = {"prompt_logprobs": [None, entry], "prompt_token_ids": [4, 5]}
    found = read_scores({"choices": [choice]}, [4, 5], [1], 2)
    assert (found.logprobs_N.tolist(), found.topk_ids_NK.tolist()) == ([logprob], [[8, 7]])


def test_of_a_token_that_stands_twice_in_an_answer_the_last_score_counts() -> None:
    text = '{"choices": [{"prompt_token_ids": [4, 5], "prompt_logprobs": [null, {"5": {"logprob": -1}, "5": %s}]}]}'
    found = read_scores(json.loads(text % '{"logprob": -2}'), [4, 5], [1], 0)
    assert found.logprobs_N.tolist() == [-2.0]
    with pytest.raises(ValueError, match="not a log-prob"):
        read_scores(json.loads(text % '{"logprob": NaN}'), [4, 5], [1], 0)


def test_a_row_as_long_as_the_context_is_refused_with_the_limit() -> None:
    with FakeVLLM(model, max_model_len=16) as server:
        client = HttpClient([server.url], tries=1)
        assert score_tokens(client, ServedModel("tiny", 16), range(15), [14]).logprobs_N.shape == (1,)
        with pytest.raises(UserError, match="scores 15 at most"):
            score_tokens(client, ServedModel("tiny", 16), range(16), [15])
        server.always = "500"
        with pytest.raises(RequestFailed):
            score_tokens(client, ServedModel("tiny", 16), range(15), [14])
