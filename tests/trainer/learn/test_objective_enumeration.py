"""The same proof through the training objective itself: trajectories in, padded micro-batches, loss out.

For every estimator, baseline, γ, weight and reward the update expected over all episodes is autograd's gradient of the
enumerated objective. Recorded log-probs are float32, as in training; so the tolerance is theirs.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_env.trainer.batch import PolicyModule, make_batch
from opd_env.trainer.learn.objective import OPDObjective
from opd_env.trainer.math.divergences import get_divergence
from opd_env.trainer.teachers.base import LocalTeacher
from tests.trainer.counted import VOCABULARY, World, trajectories, transformer
from tests.trainer.settings import objective_for
from tests.trainer.toy import toy_config


class Remote:
    """A teacher that gives its top k, but no logits."""

    def __init__(self, local: LocalTeacher) -> None:
        self.name, self.score, self.score_topk = "remote", local.score, local.score_topk


def teacher_of(world: World) -> LocalTeacher:
    return LocalTeacher(SimpleNamespace(model=world.teacher, name="counted"), vocab_size=VOCABULARY)


def objective_of(world: World, teacher: Any = None, **settings: Any) -> OPDObjective:
    settings = {"estimator": "sampled", "samples_per_problem": 2, **settings}
    return objective_for(toy_config("unused", **settings), teacher or teacher_of(world), VOCABULARY)


def decoder_gradient(world: World, loss: Tensor) -> Tensor:
    """With respect to all weights below the head."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(world.student.model.parameters()))])


def expected_update(world: World, objective: OPDObjective, sampler: Any = None) -> Tensor:
    """One padded micro-batch of all episodes; each token's gradient counts as often as its episode happens."""
    objective.begin(trajectories(world, sampler))
    batch = make_batch(objective.rows)
    assert len({len(row.token_ids_T) for row in objective.rows}) > 1  # so that there is padding
    probability_N = world.probabilities(world.episodes.logprobs(sampler or world.student)).detach()[batch.row_N]

    def loss_of(hidden_NH: Tensor, head: Any) -> Tensor:
        hidden_NH.register_hook(lambda gradient_NH: gradient_NH * probability_N[:, None])
        return objective(batch, hidden_NH, head, 1.0)

    return decoder_gradient(world, PolicyModule(world.student, VOCABULARY)(batch, loss_of))


def assert_equal_updates(got: Tensor, exact: Tensor) -> None:
    assert float(torch.cosine_similarity(got, exact, dim=0)) > 0.999999
    assert float((got - exact).norm() / exact.norm()) < 2e-6


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "total_variation"])
@pytest.mark.parametrize(
    ("estimator", "baseline", "gamma", "topk"),
    [
        ("sampled", "none", 0, 3),
        ("sampled", "none", 1, 3),
        ("sampled", "value", 0, 3),
        ("sampled", "value", 1, 3),
        ("full", "none", 0, 3),
        ("topk", "none", 0, 1),
        ("topk", "none", 0, 3),
    ],
)
def test_expected_update_is_the_gradient_of_the_objective(name, estimator, baseline, gamma, topk):
    world = World.make()
    objective = objective_of(
        world, divergence=name, estimator=estimator, baseline=baseline, gamma=float(gamma), topk_tokens=topk
    )
    exact = decoder_gradient(world, world.objective(get_divergence(name), gamma, topk=topk))
    assert_equal_updates(expected_update(world, objective), exact)


@pytest.mark.parametrize("gamma", [0, 1])
def test_a_value_baseline_from_a_top_k_alone_changes_no_expected_update(gamma):
    world = World.make()
    remote = Remote(teacher_of(world))
    objective = objective_of(
        world, remote, divergence="jsd", mode="opd_plus", baseline="value", gamma=float(gamma), topk_tokens=1
    )
    exact = decoder_gradient(world, world.objective(get_divergence("jsd"), gamma))
    assert_equal_updates(expected_update(world, objective), exact)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
@pytest.mark.parametrize(
    ("estimator", "baseline", "topk"),
    [("sampled", "none", 3), ("sampled", "value", 3), ("full", "none", 3), ("topk", "none", 1)],
)
def test_off_policy_the_importance_ratio_and_the_current_u_give_the_exact_gradient_at_the_visited_prefixes(
    name, estimator, baseline, topk
):
    world, sampler = World.make(), transformer(5)
    objective = objective_of(
        world, divergence=name, estimator=estimator, baseline=baseline, ratio_policy="current", topk_tokens=topk
    )
    exact = decoder_gradient(world, world.objective(get_divergence(name), 0, topk=topk, sampler=sampler))
    assert_equal_updates(expected_update(world, objective, sampler), exact)
    gap_N = objective.tokens.logprobs_N - objective.tokens.behaviour_logprobs_N
    assert float(gap_N.abs().mean()) > 0.1  # far off-policy indeed


def test_off_policy_the_u_of_the_older_student_gives_another_update():
    """Why ``rollout_ahead`` refuses it."""
    world, sampler = World.make(), transformer(5)
    objective = objective_of(world, divergence="jsd", ratio_policy="rollout")
    exact = decoder_gradient(world, world.objective(get_divergence("jsd"), 0, sampler=sampler))
    assert float((expected_update(world, objective, sampler) - exact).norm() / exact.norm()) > 0.05


@pytest.mark.parametrize(
    ("settings", "distilled"),
    [
        ({"divergence_coefficient": 0.0}, 0.0),
        ({"divergence_coefficient": 0.5}, 0.5),
        ({"divergence_coefficient": 0.5, "estimator": "full"}, 0.5),
    ],
)
def test_expected_update_with_a_reward_is_the_gradient_of_divergence_minus_expected_reward(settings, distilled):
    """Over all pairs of episodes of one problem: leaving the own reward out of the group's mean is unbiased."""
    world, coefficient = World.make(), 0.3
    objective = objective_of(world, divergence="jsd", reward_coefficient=coefficient, **settings)
    episodes, policy = trajectories(world), PolicyModule(world.student, VOCABULARY)
    p_B = world.probabilities(world.episodes.logprobs(world.student))
    total = torch.zeros((), dtype=torch.float64)
    for (i, one), (j, other) in itertools.combinations_with_replacement(enumerate(episodes), 2):
        pair = [one, type(other)(**{**vars(other), "sample": one.sample ^ 1})]  # together a group of two
        objective.begin(pair)
        batch = make_batch(objective.rows)
        loss = policy(batch, lambda hidden_NH, head, batch=batch: objective(batch, hidden_NH, head, 2.0))
        total = total + (1 if i == j else 2) * (p_B[i] * p_B[j]).detach() * loss
    solved_B = torch.tensor([float(one.correct) for one in episodes], dtype=torch.float64)
    wanted = distilled * world.objective(get_divergence("jsd"), 0) - coefficient * (p_B * solved_B).sum()
    assert_equal_updates(decoder_gradient(world, total), decoder_gradient(world, wanted))


def test_a_constant_advantage_of_minus_one_is_a_setting_and_teaches_nothing_in_expectation():
    """The control arm of a study: reverse KL's ln u - 1 with |ln u| bounded to nothing."""
    world = World.make()
    objective = objective_of(world, divergence="reverse_kl", mode="opd_plus", clip_log_ratio=1e-12)
    update = expected_update(world, objective)
    assert set(objective.tokens.advantages_N.tolist()) == {-1.0}
    exact = decoder_gradient(world, world.objective(get_divergence("reverse_kl"), 0))
    assert float(update.norm() / exact.norm()) < 1e-6
