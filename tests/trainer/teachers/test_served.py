"""A teacher behind servers scores as one in this process does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from opd_env.engines.servers.client import HttpClient
from opd_env.errors import UserError
from opd_env.trainer.teachers.base import LocalTeacher, TopKTeacher
from opd_env.trainer.teachers.served import ServerTeacher
from tests.engines.fake_vllm import FakeVLLM
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.toy import loaded, made_trajectory

VOCAB = len(tiny_tokenizer())
EPISODES = [made_trajectory(seed, turns=turns) for seed, turns in enumerate([(3, 2), (4,), (1, 1, 5), (2, 2)])]


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    with FakeVLLM(lambda: tiny_llama(seed=5, initializer_range=0.3)) as one:
        yield one


def teacher_of(*servers: FakeVLLM, prompt: Any = None, **changes: Any) -> ServerTeacher:
    client = HttpClient([one.url for one in servers], **{"pause_s": 0.01, "patience_s": 5.0, "tries": 20, **changes})
    return ServerTeacher(client, vocab_size=VOCAB, prompt=prompt)


def local(prompt: Any = None) -> LocalTeacher:
    return LocalTeacher(loaded(seed=5, spread=0.3), vocab_size=VOCAB, prompt=prompt)


def test_scores_equal_those_of_the_model_in_this_process(server: FakeVLLM) -> None:
    teacher = teacher_of(server)
    assert isinstance(teacher, TopKTeacher)
    torch.testing.assert_close(teacher.score(EPISODES), local().score(EPISODES), atol=1e-4, rtol=1e-4)
    ours, theirs = local().score_topk(EPISODES, 5), teacher.score_topk(EPISODES, 5)
    assert torch.equal(theirs.topk_ids_NK, ours.topk_ids_NK)
    torch.testing.assert_close(theirs.topk_logprobs_NK, ours.topk_logprobs_NK, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs.logprobs_N, ours.logprobs_N, atol=1e-4, rtol=1e-4)
    assert teacher.score([]).shape == (0,)
    assert teacher.score_topk([], 5).topk_ids_NK.shape == (0, 5)


def test_another_prompt_is_read_in_place_of_the_students(server: FakeVLLM) -> None:
    def prompt(trajectory: Any) -> list[list[int]]:
        return [[9, 8, 7, *trajectory.token_ids[:5].tolist()]]

    torch.testing.assert_close(
        teacher_of(server, prompt=prompt).score(EPISODES), local(prompt).score(EPISODES), atol=1e-4, rtol=1e-4
    )


def test_faults_and_a_second_server_change_no_score(server: FakeVLLM) -> None:
    calm = teacher_of(server).score(EPISODES)
    server.answered = 0
    server.faults = ["500", "garbage", "reset", "truncated", "429:0.01", "not json"]
    with FakeVLLM(server.make_model) as second:
        assert torch.equal(teacher_of(server, second).score(EPISODES), calm)
    assert teacher_of(server).score(EPISODES).shape == calm.shape


def test_a_server_killed_and_restarted_while_it_scores_loses_and_doubles_nothing(server: FakeVLLM) -> None:
    episodes = EPISODES * 4
    calm = teacher_of(server).score(episodes)
    server.answered, server.delay_s = 0, 0.05
    with server.crashing(after_s=0.1, away_s=0.1):
        scores = teacher_of(server, concurrency=3).score(episodes)
    assert torch.equal(scores, calm)
    assert server.answered >= len(episodes)  # an answer that was lost on its way was written all the same


def test_an_episode_that_cannot_be_scored_is_named(server: FakeVLLM) -> None:
    teacher = teacher_of(server, tries=2)
    server.always = "500"
    with pytest.raises(UserError, match=r"could not score the episode of toy_sums/train-\d: .* failed 2 times"):
        teacher.score(EPISODES)


def test_tokens_that_the_student_lacks_are_refused(server: FakeVLLM) -> None:
    teacher = ServerTeacher(HttpClient([server.url]), vocab_size=3)
    with pytest.raises(UserError, match="which the student's tokenizer of 3 tokens does not have"):
        teacher.score_topk(EPISODES, 4)
