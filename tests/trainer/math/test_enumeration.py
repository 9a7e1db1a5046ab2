"""The proof: expected updates, by enumeration of everything that can be sampled, are the exact gradients.

One token: a softmax over 50 outcomes. Whole episodes: a transformer with three tokens, a prompt, forced tool output in
the middle and an early end, through the same log-prob, advantage and loss code that training runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from opd_env.trainer.math.advantages import advantage
from opd_env.trainer.math.divergences import Divergence, get_divergence, list_divergences, register_divergence
from opd_env.trainer.math.logprobs import full_divergence
from opd_env.trainer.math.loss import mean_loss, policy_loss
from tests.trainer.counted import (
    END,
    PROMPT,
    Episodes,
    World,
    assert_same_direction_and_size,
    flat_gradient,
    tool_output,
)

NAMES = [*list_divergences(), "triangular"]
CORRECTED = ["opd_plus", "opd_plus_centred"]


@pytest.fixture(autouse=True)
def users_own_divergence(forget_registered_divergences: None) -> None:
    register_divergence("triangular", lambda u: (u - 1) ** 2 / (u + 1))


# --- one token ---------------------------------------------------------------------------------------------------


@dataclass
class Softmax:
    """A student and a teacher over 50 tokens."""

    student: Tensor
    teacher: Tensor

    @classmethod
    def random(cls, seed: int) -> Softmax:
        generator = torch.Generator().manual_seed(seed)
        student = 1.5 * torch.randn(50, generator=generator, dtype=torch.float64)
        return cls(student.requires_grad_(), 1.5 * torch.randn(50, generator=generator, dtype=torch.float64))

    def exact_gradient(self, divergence: Divergence) -> Tensor:
        p, q = self.student.softmax(0), self.teacher.softmax(0)
        return torch.autograd.grad((p * divergence.f(q / p)).sum(), self.student)[0]

    def sampled_gradients(self, divergence: Divergence, mode: str, behaviour: Tensor, baseline: float | None) -> Tensor:
        """The update that each of the 50 possible samples would cause, one row each."""
        logprobs = self.student.log_softmax(0)
        log_ratio = self.teacher.log_softmax(0) - logprobs.detach()
        value = None if baseline is None else torch.full_like(log_ratio, baseline)
        advantages = advantage(log_ratio, divergence, mode, baseline=value)
        one = torch.ones(1, dtype=torch.bool)
        rows = []
        for token in range(50):
            own = slice(token, token + 1)
            loss = policy_loss(logprobs[own], behaviour[own], advantages[own], one, num_tokens=1)
            rows.append(torch.autograd.grad(loss, self.student, retain_graph=True)[0])
        return torch.stack(rows)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", CORRECTED)
@pytest.mark.parametrize("policy", ["on-policy", "off-policy"])
def test_expected_sampled_update_is_the_gradient_of_the_divergence(name, mode, policy):
    world, divergence = Softmax.random(0), get_divergence(name)
    sampler = world.student.detach() if policy == "on-policy" else Softmax.random(7).student.detach()
    behaviour = sampler.log_softmax(0)
    gradients = world.sampled_gradients(divergence, mode, behaviour, None)
    assert_same_direction_and_size(behaviour.exp() @ gradients, world.exact_gradient(divergence))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", CORRECTED)
def test_full_update_is_the_gradient_of_the_divergence(name, mode):
    world, divergence = Softmax.random(1), get_divergence(name)
    scores = full_divergence(world.student[None], lambda x: x, world.teacher[None], lambda x: x, divergence, mode)
    (gradient,) = torch.autograd.grad(mean_loss(scores.loss_N, 1), world.student)
    assert_same_direction_and_size(gradient, world.exact_gradient(divergence))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "reverse_kl"])
def test_stop_gradient_update_is_not_the_gradient_of_the_divergence(name):
    world, divergence = Softmax.random(2), get_divergence(name)
    behaviour = world.student.detach().log_softmax(0)
    update = behaviour.exp() @ world.sampled_gradients(divergence, "opd", behaviour, None)
    exact = world.exact_gradient(divergence)
    assert float((update - exact).norm() / exact.norm()) > 0.1


def test_stop_gradient_update_of_reverse_kl_is_exact():
    world, divergence = Softmax.random(2), get_divergence("reverse_kl")
    behaviour = world.student.detach().log_softmax(0)
    update = behaviour.exp() @ world.sampled_gradients(divergence, "opd", behaviour, None)
    assert_same_direction_and_size(update, world.exact_gradient(divergence))


def test_stop_gradient_forward_kl_points_away_from_the_teacher():
    cosines = []
    for seed in range(20):
        world, divergence = Softmax.random(seed), get_divergence("forward_kl")
        behaviour = world.student.detach().log_softmax(0)
        update = behaviour.exp() @ world.sampled_gradients(divergence, "opd", behaviour, None)
        cosines.append(float(torch.cosine_similarity(update, world.exact_gradient(divergence), dim=0)))
    assert sum(cosines) / 20 < -0.8


@pytest.mark.parametrize("name", NAMES)
def test_baselines_share_the_expected_gradient_and_centring_lowers_the_variance_of_reverse_kl(name):
    world, divergence = Softmax.random(3), get_divergence(name)
    scores = full_divergence(world.student[None], lambda x: x, world.teacher[None], lambda x: x, divergence)
    behaviour = world.student.detach().log_softmax(0)
    p = behaviour.exp()
    variance = {}
    for kind, mode, baseline in (
        ("raw", "opd_plus", None),
        ("centred", "opd_plus_centred", None),
        ("value", "opd_plus", float(scores.baseline_N)),
    ):
        gradients = world.sampled_gradients(divergence, mode, behaviour, baseline)
        mean = p @ gradients
        assert_same_direction_and_size(mean, world.exact_gradient(divergence))
        variance[kind] = float(p @ (gradients - mean).square().sum(1))
    print(name, {kind: round(value, 4) for kind, value in variance.items()})
    if name == "reverse_kl":
        assert variance["centred"] < variance["raw"]
        assert variance["value"] < variance["raw"]
    if divergence.slope_at_one == 0:
        assert variance["centred"] == pytest.approx(variance["raw"])


@pytest.mark.parametrize("tilt", [-3.0, 2.0])
def test_how_f_is_written_matters_to_the_stop_gradient_only(tilt):
    world = Softmax.random(4)
    behaviour = world.student.detach().log_softmax(0)
    p = behaviour.exp()
    plain = get_divergence("hellinger")
    tilted = register_divergence("tilted", lambda u: plain.f(u) + tilt * (u - 1))
    for mode, same in (("opd", False), ("opd_plus", True), ("opd_plus_centred", True)):
        one = p @ world.sampled_gradients(plain, mode, behaviour, None)
        other = p @ world.sampled_gradients(tilted, mode, behaviour, None)
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12) is same


# --- whole episodes ----------------------------------------------------------------------------------------------


def test_the_enumerated_episodes_are_all_that_can_happen():
    world = World.make()
    total = world.probabilities(world.episodes.logprobs(world.student)).sum()
    assert float(total.detach()) == pytest.approx(1)
    assert len(world.episodes.ids_BT) == 3 + 6 * 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", CORRECTED)
@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_expected_update_over_all_episodes_is_the_gradient_of_the_objective(name, mode, gamma, padding):
    world, divergence = World.make(padding), get_divergence(name)
    exact = flat_gradient(world.objective(divergence, gamma), world.student)
    assert_same_direction_and_size(world.expected_update(divergence, mode, gamma), exact)


@pytest.mark.parametrize("gamma", [0, 1])
def test_stop_gradient_misses_the_objective_but_for_reverse_kl(gamma):
    for name, biased in (("forward_kl", True), ("jsd", True), ("hellinger", True), ("reverse_kl", False)):
        world, divergence = World.make(), get_divergence(name)
        exact = flat_gradient(world.objective(divergence, gamma), world.student)
        update = world.expected_update(divergence, "opd", gamma)
        assert (float((update - exact).norm() / exact.norm()) > 0.05) is biased


@pytest.mark.parametrize("name", NAMES)
def test_full_update_over_all_episodes_is_the_gradient_of_the_objective(name):
    world, divergence = World.make("left"), get_divergence(name)
    student, teacher, episodes = world.student, world.teacher, world.episodes
    scores = full_divergence(
        episodes.hidden(student), student.lm_head, episodes.hidden(teacher), teacher.lm_head, divergence, chunk_size=5
    )
    probabilities = world.probabilities(episodes.logprobs(student)).detach()
    weights_N = probabilities[:, None].expand_as(episodes.sampled_BT)[episodes.sampled_BT]
    update = flat_gradient(mean_loss(scores.loss_N * weights_N, 1), student)
    assert_same_direction_and_size(update, flat_gradient(world.objective(divergence, 0), student))


def test_forgetting_the_tool_mask_would_be_noticed():
    world, divergence = World.make(), get_divergence("jsd")
    exact = flat_gradient(world.objective(divergence, 0), world.student)
    wrong = world.episodes.attention_BT.bool()
    wrong[:, : len(PROMPT)] = False  # trains on tool output too
    world.episodes.sampled_BT = wrong
    update = world.expected_update(divergence, "opd_plus_centred", 0)
    assert float((update - exact).norm() / exact.norm()) > 0.1


# --- Monte Carlo -------------------------------------------------------------------------------------------------


def sample_episodes(model: LlamaForCausalLM, count: int, seed: int) -> Episodes:
    """Ancestral sampling, the whole batch a token at a time."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([PROMPT]).expand(count, -1)

    def sample(prefixes: Tensor) -> Tensor:
        with torch.no_grad():
            p = model(input_ids=prefixes).logits[:, -1].softmax(1)
        return torch.multinomial(p, 1, generator=generator)

    for _ in range(2):
        rows = torch.cat([rows, sample(rows)], 1)
    finished = [(row, [False, False, True, True]) for row in rows[rows[:, 3] == END].tolist()]
    open_rows = rows[rows[:, 3] != END]
    forced = torch.tensor([tool_output((first, second)) for first, second in open_rows[:, 2:4].tolist()])
    open_rows = torch.cat([open_rows, forced], 1)
    open_rows = torch.cat([open_rows, sample(open_rows)], 1)
    own = [False, False, True, True, False, False, False, True]
    return Episodes.pad(finished + [(row, own) for row in open_rows.tolist()], "left")


@pytest.mark.parametrize(("name", "gamma"), [("jsd", 0), ("forward_kl", 0), ("reverse_kl", 1)])
def test_the_mean_over_sampled_episodes_approaches_the_exact_gradient_as_one_over_root_n(name, gamma):
    world, divergence = World.make(), get_divergence(name)
    exact = flat_gradient(world.objective(divergence, gamma), world.student)
    probabilities, gradients = world.every_update(divergence, gamma)
    one_sample = float(probabilities @ (gradients - exact).square().sum(1))  # variance of one episode's update
    errors = {}
    for count in (32, 512):
        squares = []
        for seed in range(20):
            episodes = sample_episodes(world.student, count, 1000 * count + seed)
            logprobs_BT = episodes.logprobs(world.student, chunk_size=4096)
            log_ratio_BT = episodes.logprobs(world.teacher, chunk_size=4096) - logprobs_BT.detach()
            advantages_BT = advantage(log_ratio_BT, divergence, gamma=gamma, mask=episodes.sampled_BT)
            loss = policy_loss(logprobs_BT, logprobs_BT.detach(), advantages_BT, episodes.sampled_BT, num_tokens=count)
            squares.append(float((flat_gradient(loss, world.student) - exact).square().sum()))
        errors[count] = sum(squares) / len(squares)
        assert errors[count] == pytest.approx(one_sample / count, rel=0.6)
    assert errors[512] < errors[32] / 5
