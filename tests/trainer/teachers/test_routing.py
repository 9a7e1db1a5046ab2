"""Several teachers: every episode is scored by the one that its problem names, and comes back in its place."""

from dataclasses import replace

import pytest
import torch

from opd_env.errors import TrainingError
from opd_env.trainer.teachers.base import LocalTeacher
from opd_env.trainer.teachers.many import NameRoute, RoutedTeacher
from opd_env.trainer.teachers.prompts import ExampleFinder
from tests.tiny import tiny_tokenizer
from tests.trainer.toy import ToySums, loaded, made_trajectory

TRAJECTORIES = [made_trajectory(seed, turns=(1 + seed % 3, 2)) for seed in range(7)]
GENERAL, SPECIAL = (LocalTeacher(loaded(seed, spread=0.5), vocab_size=len(tiny_tokenizer())) for seed in (5, 6))


def odd(trajectory):
    return "odd" if int(trajectory.example_id.removeprefix("train-")) % 2 else None


def test_every_episode_is_scored_by_its_own_teacher_in_the_order_given():
    routed = RoutedTeacher(GENERAL, {"odd": SPECIAL}, odd)
    expected = [(SPECIAL if odd(one) else GENERAL).score([one]) for one in TRAJECTORIES]
    torch.testing.assert_close(routed.score(TRAJECTORIES), torch.cat(expected), rtol=1e-4, atol=1e-5)
    top = routed.score_topk(TRAJECTORIES, 3)
    alone = [(SPECIAL if odd(one) else GENERAL).score_topk([one], 3) for one in TRAJECTORIES]
    for name in ("logprobs_N", "topk_ids_NK", "topk_logprobs_NK"):
        together = torch.cat([getattr(one, name) for one in alone])
        torch.testing.assert_close(getattr(top, name), together, rtol=1e-4, atol=1e-5)


def test_no_episode_gives_no_score():
    routed = RoutedTeacher(GENERAL, {"odd": SPECIAL}, odd)
    assert routed.score([]).shape == (0,)
    assert routed.score_topk([], 3).topk_ids_NK.shape == (0, 3)


class Plain:
    name = "plain"

    def __init__(self, lost=0):
        self.lost = lost

    def score(self, trajectories):
        return torch.zeros(sum(one.num_sampled for one in trajectories) - self.lost)


def test_a_teacher_that_loses_a_token_or_has_no_top_k_is_named():
    with pytest.raises(TrainingError, match="the teacher plain gave"):
        RoutedTeacher(GENERAL, {"odd": Plain(lost=1)}, odd).score(TRAJECTORIES)
    with pytest.raises(TrainingError, match="plain gives one log-prob per token"):
        RoutedTeacher(GENERAL, {"odd": Plain()}, odd).score_topk(TRAJECTORIES, 3)


def test_a_problem_is_routed_by_the_tools_that_it_offers_then_by_its_task():
    class Sums(ToySums):
        name = "toy_sums"

        def tools_of(self, example):
            return ("calculator",) if example.id.endswith(("1", "3")) else ()

    task = Sums("train")
    find = ExampleFinder([task])
    played = [replace(made_trajectory(seed), question=task[seed].messages[-1]["content"]) for seed in (1, 2, 3)]
    assert [NameRoute(["calculator"], find)(one) for one in played] == ["calculator", None, "calculator"]
    both = NameRoute(["toy_sums", "calculator"], find)
    assert [both(one) for one in played] == ["calculator", "toy_sums", "calculator"]
    assert [NameRoute(["calculator"], find, tools=["python"])(one) for one in played] == [None] * 3
    with pytest.raises(ValueError, match="has no example"):
        both(made_trajectory(5))
