"""Servers that would bias training are found out; good ones pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from opd_env.errors import UserError
from opd_env.formats import get_format
from opd_env.http_client import HttpClient, RequestFailed
from opd_env.server_model import ServedModel
from opd_env.server_probe import probe_servers
from opd_env.server_scores import read_scores, score_tokens
from tests.core.fake_vllm import FakeVLLM
from tests.core.tiny import tiny_llama, tiny_tokenizer

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
    ):
        with pytest.raises((ValueError, KeyError)):
            read_scores({"choices": [{**choice, **bad}]}, [4, 5, 6], [1, 2], 0)


def test_a_row_as_long_as_the_context_is_refused_with_the_limit() -> None:
    with FakeVLLM(model, max_model_len=16) as server:
        client = HttpClient([server.url], tries=1)
        assert score_tokens(client, ServedModel("tiny", 16), range(15), [14]).logprobs_N.shape == (1,)
        with pytest.raises(UserError, match="scores 15 at most"):
            score_tokens(client, ServedModel("tiny", 16), range(16), [15])
        server.always = "500"
        with pytest.raises(RequestFailed):
            score_tokens(client, ServedModel("tiny", 16), range(15), [14])
