"""The local engine against the model itself: batches, slots and kept caches change no token."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from opd_env.engine import GREEDY, Request, SamplingParams, ScriptedEngine
from opd_env.local_engine import LocalEngine
from tests.core.tiny import tiny_llama

VOCAB = 60


def prefixes(count: int, seed: int = 0) -> list[list[int]]:
    drawn = random.Random(seed)
    return [[drawn.randrange(2, VOCAB) for _ in range(drawn.randrange(1, 40))] for _ in range(count)]


def reference_greedy(model: torch.nn.Module, prefix: list[int], count: int, stop: int = 1) -> list[int]:
    ids: list[int] = []
    while len(ids) < count and stop not in ids:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([prefix + ids])).logits[0, -1, :VOCAB].argmax()))
    return ids


def test_greedy_turns_are_those_of_a_plain_forward_whatever_the_batch() -> None:
    model = tiny_llama(vocab_size=64)
    engine = LocalEngine(model, [1], VOCAB, capacity=4)
    given = prefixes(11)
    completions = engine.generate(given, SamplingParams(temperature=0, max_tokens=9))
    for prefix, completion in zip(given, completions, strict=True):
        assert completion.token_ids == reference_greedy(model, prefix, 9)
        assert completion.truncated == (completion.token_ids[-1] != 1)


def test_a_kept_cache_gives_what_a_fresh_one_gives_over_interleaved_turns() -> None:
    """Episodes come, wait, grow by different amounts, leave and are replaced, in random order."""
    model = tiny_llama(vocab_size=64)
    engine = LocalEngine(model, [1], VOCAB, capacity=5)
    drawn = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=6)
    texts: dict[int, list[int]] = {}
    waiting: set[int] = set()
    compared = 0
    for number in range(400):
        action = drawn.random()
        if action < 0.25 and len(texts) < 5:
            texts[number] = prefixes(1, number)[0]
            engine.submit(Request(number, texts[number], params))
            waiting.add(number)
        elif action < 0.35 and texts:
            gone = drawn.choice(sorted(texts))
            engine.release(gone)
            waiting.discard(gone)
            del texts[gone]
        elif action < 0.6 and set(texts) - waiting:
            episode = drawn.choice(sorted(set(texts) - waiting))
            texts[episode] += [drawn.randrange(2, VOCAB) for _ in range(drawn.randrange(1, 9))]
            if len(texts[episode]) < 200:
                engine.submit(Request(episode, list(texts[episode]), params))
                waiting.add(episode)
        for completion in engine.step():
            assert completion.token_ids == reference_greedy(model, texts[completion.episode], 6)
            texts[completion.episode] += completion.token_ids
            waiting.discard(completion.episode)
            compared += 1
    assert compared > 50


def test_a_prefix_that_changed_is_not_read_from_the_cache() -> None:
    model = tiny_llama(vocab_size=64)
    engine = LocalEngine(model, [1], VOCAB)
    params = SamplingParams(temperature=0, max_tokens=4)
    for prefix in ([5, 6, 7, 8, 9], [5, 6, 30, 31], [5, 6], [5, 6]):
        engine.submit(Request(0, prefix, params))
        while not (done := engine.step()):
            pass
        assert done[0].token_ids == reference_greedy(model, prefix, 4)


def test_samples_follow_the_models_distribution() -> None:
    model = tiny_llama(vocab_size=8, hidden=32, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
        expected = model(torch.tensor([[2, 3]])).logits[0, -1].softmax(-1).numpy()
    engine = LocalEngine(model, [], 8, capacity=500)
    completions = engine.generate([[2, 3]] * 4000, SamplingParams(max_tokens=1))
    counts = np.bincount([one.token_ids[0] for one in completions], minlength=8)
    spread = np.sqrt(4000 * expected * (1 - expected))
    assert np.all(np.abs(counts - 4000 * expected) < 5 * spread + 1)
    drawn = [expected[one.token_ids[0]] for one in completions]
    assert np.allclose([one.logprobs[0] for one in completions], np.log(drawn), atol=1e-4)


def test_log_probs_are_of_the_sampling_temperature() -> None:
    model = tiny_llama(vocab_size=64)
    (one,) = LocalEngine(model, [], VOCAB).generate([[2, 3]], SamplingParams(temperature=0.5, max_tokens=1))
    with torch.no_grad():
        logprobs = (model(torch.tensor([[2, 3]])).logits[0, -1, :VOCAB] / 0.5).log_softmax(-1)
    assert abs(float(logprobs[one.token_ids[0]]) - one.logprobs[0]) < 1e-4


@pytest.mark.parametrize("params", [SamplingParams(top_k=1, max_tokens=5), SamplingParams(top_p=1e-6, max_tokens=5)])
def test_the_narrowest_truncation_is_greedy(params: SamplingParams) -> None:
    engine = LocalEngine(tiny_llama(vocab_size=64), [1], VOCAB)
    greedy = engine.generate(prefixes(3), SamplingParams(temperature=0, max_tokens=5))
    assert [one.token_ids for one in engine.generate(prefixes(3), params)] == [one.token_ids for one in greedy]


def test_padding_of_the_head_is_never_sampled() -> None:
    model = tiny_llama(vocab_size=64)
    engine = LocalEngine(model, [], 3)
    sampled = engine.generate([[2]] * 30, SamplingParams(max_tokens=5))
    assert {index for one in sampled for index in one.token_ids} == {0, 1, 2}


def test_a_new_weight_is_used_at_once() -> None:
    model = tiny_llama(vocab_size=64)
    engine = LocalEngine(model, [], VOCAB)
    engine.generate([[2, 3]], SamplingParams(temperature=0, max_tokens=4))
    with torch.no_grad():
        model.lm_head.weight.neg_()
    (after,) = engine.generate([[2, 3]], SamplingParams(temperature=0, max_tokens=4))
    assert after.token_ids == reference_greedy(model, [2, 3], 4)


def test_a_request_beyond_the_context_is_refused() -> None:
    engine = LocalEngine(tiny_llama(vocab_size=64), [1], VOCAB)
    with pytest.raises(ValueError, match="context of 1024"):
        engine.submit(Request(0, [2] * 1000, SamplingParams(max_tokens=100)))
    with pytest.raises(ValueError, match="empty"):
        engine.submit(Request(0, [], GREEDY))


def test_the_model_keeps_its_training_mode() -> None:
    model = tiny_llama(vocab_size=64).train()
    LocalEngine(model, [1], VOCAB).generate([[2]], SamplingParams(max_tokens=2))
    assert model.training


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"max_tokens": 0}]
)
def test_impossible_sampling_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_a_scripted_engine_cuts_and_flags_like_a_real_one() -> None:
    engine = ScriptedEngine(lambda request, turn: [5, 6, 7, 1][turn:], [1])
    first, second = engine.generate([[2], [3]], SamplingParams(max_tokens=3))
    assert (first.token_ids, first.truncated, second.truncated) == ([5, 6, 7], True, True)
    (whole,) = engine.generate([[2]], SamplingParams(max_tokens=9))
    assert (whole.token_ids, whole.truncated) == ([5, 6, 7, 1], False)
