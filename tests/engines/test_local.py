"""The local engine against the model itself: batches, slots and kept caches change no token."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from opd_env.engines.base import GREEDY, Request, SamplingParams, ScriptedEngine
from opd_env.engines.local import LocalEngine
from tests.tiny import tiny_llama

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


def fed(model: torch.nn.Module) -> list[tuple[int, ...]]:
    """Rows and width of every forward of a model, from now on."""
    shapes: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(
        lambda module, args, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_what_prompts_begin_with_is_prefilled_once() -> None:
    model = tiny_llama(vocab_size=64)
    drawn = random.Random(1)
    system = [drawn.randrange(2, VOCAB) for _ in range(90)]
    questions = [[drawn.randrange(2, VOCAB) for _ in range(8)] for _ in range(6)]
    given = [system + question for question in questions for _ in range(3)]
    engine = LocalEngine(model, [1], VOCAB)
    shapes = fed(model)
    completions = engine.generate(given, SamplingParams(temperature=0, max_tokens=3))
    # One prompt as a whole; the ends of the others' questions; then only the last token of their further samples.
    assert [shape for shape in shapes if shape != (18, 1)] == [(1, 98), (17, 8)]
    for prefix, completion in zip(given, completions, strict=True):
        assert completion.token_ids == reference_greedy(model, prefix, 3)


def test_an_open_episode_lends_what_it_read_and_a_closed_one_does_not() -> None:
    model = tiny_llama(vocab_size=64)
    engine = LocalEngine(model, [], VOCAB)
    shapes = fed(model)
    params, prefix = SamplingParams(temperature=0, max_tokens=2), list(range(2, 42))
    for episode, first in ((0, (1, 40)), (1, (1, 1)), (2, (1, 1))):
        shapes.clear()
        engine.submit(Request(episode, prefix, params))
        (done,) = [one for _ in range(2) for one in engine.step()]
        assert (shapes[0], done.token_ids) == (first, reference_greedy(model, prefix, 2)[:2])
    for episode in range(3):
        engine.release(episode)
    shapes.clear()
    engine.submit(Request(3, prefix, params))
    engine.step()
    assert shapes[0] == (1, 40)


@pytest.mark.parametrize("seed", range(6))
def test_prompts_that_branch_anywhere_are_continued_as_if_each_were_alone(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Also turns that rewrite what stood before, beside episodes that read from them."""
    monkeypatch.setattr("opd_env.engines.local._FORWARD_TOKENS", seed % 3)  # sharing is always worth a forward
    drawn = random.Random(seed)
    model = tiny_llama(vocab_size=64, seed=seed)
    engine = LocalEngine(model, [1], VOCAB, capacity=9)
    params = SamplingParams(temperature=0, max_tokens=3)
    texts: dict[int, list[int]] = {}
    for number in range(12):
        for episode in drawn.sample(range(20), 6):
            known = drawn.choice([*texts.values(), [2]])
            text = known[: drawn.randrange(1, len(known) + 1)] + [
                drawn.choice((2, 3)) for _ in range(drawn.randrange(9))
            ]
            if len(texts) < 9 or episode in texts:
                texts[episode] = text[:120]
                engine.submit(Request(episode, texts[episode], params))
        while engine.busy:
            for completion in engine.step():
                assert completion.token_ids == reference_greedy(model, texts[completion.episode], 3), number
                texts[completion.episode] = texts[completion.episode] + completion.token_ids
        for episode in drawn.sample(sorted(texts), 3):
            engine.release(episode)
            del texts[episode]


def test_padding_beyond_the_context_harms_no_model_with_learned_positions() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
    engine = LocalEngine(model, [], VOCAB)
    params = SamplingParams(temperature=0, max_tokens=2)
    long, short = prefixes(40)[0] * 60, list(range(2, 32))
    engine.submit(Request(0, long[:58], params))
    engine.step()
    engine.step()
    engine.submit(Request(0, long[:60], params))
    engine.submit(Request(1, short, params))
    found = {one.episode: one.token_ids for _ in range(2) for one in engine.step()}
    assert found == {0: reference_greedy(model, long[:60], 2), 1: reference_greedy(model, short, 2)}


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


@pytest.mark.parametrize("values", [{"temperature": -1}, {"max_tokens": 0}])
def test_impossible_sampling_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_a_scripted_engine_cuts_and_flags_like_a_real_one() -> None:
    engine = ScriptedEngine(lambda request, turn: [5, 6, 7, 1][turn:], [1])
    first, second = engine.generate([[2], [3]], SamplingParams(max_tokens=3))
    assert (first.token_ids, first.truncated, second.truncated) == ([5, 6, 7], True, True)
    (whole,) = engine.generate([[2]], SamplingParams(max_tokens=9))
    assert (whole.token_ids, whole.truncated) == ([5, 6, 7, 1], False)
