"""The objective of a step: its gradient against sums written out by hand, for every split."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from opd_env.errors import TrainingError
from opd_env.trainer.batch import PolicyModule
from opd_env.trainer.learn.objective import TokenValues
from opd_env.trainer.learn.token_weights import TokenWeights
from opd_env.trainer.learn.update import Updater
from opd_env.trainer.math.divergences import get_divergence
from opd_env.trainer.teachers.base import LocalTeacher
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.settings import objective_for
from tests.trainer.toy import loaded, made_trajectory, naive_logprobs, rows_of, targets_of, toy_config

VOCABULARY = len(tiny_tokenizer())
TRAJECTORIES = [made_trajectory(seed, prompt=3 + seed, turns=(1 + seed, 2)) for seed in range(4)]
N = sum(one.num_sampled for one in TRAJECTORIES)


def student():
    return tiny_llama(seed=3, initializer_range=0.2).double()


def teacher(**keywords):
    one = loaded(8, spread=0.3)
    one.model.double()
    return LocalTeacher(one, vocab_size=VOCABULARY, **keywords)


def gradient_of(config, model, trajectories=TRAJECTORIES, budget=10_000, by=None):
    """What the optimiser sees (by a learning rate of 0 the weights stay), and the objective."""
    objective = objective_for(config, by or teacher(temperature=config.sampling.temperature), VOCABULARY)
    updater = Updater(PolicyModule(model, VOCABULARY), Accelerator(), tokens_per_microbatch=budget, max_grad_norm=1e9)
    seen = {}
    updater.parallel.optimizer.optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in updater.parameters.items()})
    )
    objective.begin(trajectories)
    update = updater.update(objective.rows, objective, 0.0)
    return seen, objective, update


def assert_gradients_equal(found, loss, model):
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("budget", [1, 30, 10_000])
@pytest.mark.parametrize(
    ("divergence", "mode"), [("jsd", "opd_plus_centred"), ("forward_kl", "opd_plus"), ("jsd", "opd")]
)
@pytest.mark.parametrize("ratio", ["rollout", "current"])
def test_sampled_gradient_is_the_written_out_sum(tmp_path, budget, divergence, mode, ratio):
    from opd_env.trainer.math.advantages import advantage

    config = toy_config(tmp_path, estimator="sampled", divergence=divergence, mode=mode, ratio_policy=ratio)
    model = student()
    found, objective, _ = gradient_of(config, model, budget=budget)
    reference = copy.deepcopy(model)
    logprobs_N = naive_logprobs(reference, rows_of(TRAJECTORIES)).gather(1, targets_of(TRAJECTORIES)[:, None])[:, 0]
    behaviour_N = objective.tokens.behaviour_logprobs_N.double()
    teacher_N = teacher().score(TRAJECTORIES).double()
    log_u_N = teacher_N - (behaviour_N if ratio == "rollout" else logprobs_N.detach())
    advantages_N = advantage(log_u_N, divergence, mode)
    loss = -((logprobs_N - behaviour_N).exp() * advantages_N).sum() / N
    assert_gradients_equal(found, loss, reference)
    torch.testing.assert_close(objective.tokens.log_ratio_N.double(), log_u_N, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(objective.tokens.kl_N, -objective.tokens.log_ratio_N)
    torch.testing.assert_close(objective.tokens.advantages_N.double(), advantages_N, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_reward_to_go_stays_within_its_episode_and_skips_tool_output(tmp_path, budget):
    config = toy_config(tmp_path, estimator="sampled", gamma=0.5)
    _, objective, _ = gradient_of(config, student(), budget=budget)
    log_u = objective.tokens.log_ratio_N.split([one.num_sampled for one in TRAJECTORIES])
    expected = []
    for values in log_u:  # reverse KL: own token log u, later tokens γ^n log u, sampled tokens counted only
        expected += [sum(0.5**n * value for n, value in enumerate(values[k:].tolist())) for k in range(len(values))]
    torch.testing.assert_close(objective.tokens.advantages_N, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 30, 10_000])
@pytest.mark.parametrize(("divergence", "temperature"), [("reverse_kl", 1.0), ("jsd", 1.0), ("forward_kl", 0.7)])
def test_full_gradient_is_that_of_the_divergence(tmp_path, budget, divergence, temperature):
    config = toy_config(tmp_path, divergence=divergence, temperature=temperature)
    model = student()
    found, objective, update = gradient_of(config, model, budget=budget)
    reference = copy.deepcopy(model)
    p_NV = naive_logprobs(reference, rows_of(TRAJECTORIES), temperature)
    with torch.no_grad():
        q_NV = naive_logprobs(teacher().loaded.model, rows_of(TRAJECTORIES), temperature)
    divergence_N = (p_NV.exp() * get_divergence(divergence).f((q_NV - p_NV).exp())).sum(1)
    loss = divergence_N.sum() / N
    assert update.loss == pytest.approx(loss.item(), rel=1e-5)
    kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(1).detach().float()
    torch.testing.assert_close(objective.tokens.kl_N, kl_N, rtol=1e-4, atol=1e-5)
    entropy_N = -(p_NV.exp() * p_NV).sum(1).detach().float()
    torch.testing.assert_close(objective.tokens.entropy_N, entropy_N, rtol=1e-4, atol=1e-5)
    assert_gradients_equal(found, loss, reference)


def test_a_privileged_teacher_is_compared_at_the_same_tokens(tmp_path):
    """Student rows and longer teacher rows: full KL of every token equals a naive loop over both."""
    privileged = teacher(prompt=lambda trajectory: [[20, 21, 22, 23, 24, 25, 26]])
    config = toy_config(tmp_path)
    model = student()
    _, objective, _ = gradient_of(config, model, budget=30, by=privileged)
    rows = []
    for ids, sampled in rows_of(TRAJECTORIES):
        start = sampled.index(True)
        rows.append(([20, 21, 22, 23, 24, 25, 26, *ids[start:]], [False] * 7 + sampled[start:]))
    with torch.no_grad():
        p_NV, q_NV = naive_logprobs(model, rows_of(TRAJECTORIES)), naive_logprobs(privileged.loaded.model, rows)
    kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(1).float()
    torch.testing.assert_close(objective.tokens.kl_N, kl_N, rtol=1e-4, atol=1e-5)


class Remote:
    """Gives one log-prob per token, as a server does."""

    name = "remote"

    def __init__(self, lost=0):
        self.lost = lost

    def score(self, trajectories):
        return torch.full((sum(one.num_sampled for one in trajectories) - self.lost,), -2.0)


def test_a_remote_teacher_serves_the_sampled_estimator_only(tmp_path):
    _, objective, _ = gradient_of(toy_config(tmp_path, estimator="sampled"), student(), by=Remote())
    expected_N = -2.0 - objective.tokens.behaviour_logprobs_N
    torch.testing.assert_close(objective.tokens.log_ratio_N, expected_N)
    with pytest.raises(ValueError, match="set estimator=sampled"):
        objective_for(toy_config(tmp_path), Remote(), VOCABULARY)


def test_a_teacher_that_loses_a_token_stops_the_step(tmp_path):
    objective = objective_for(toy_config(tmp_path, estimator="sampled"), Remote(lost=1), VOCABULARY)
    with pytest.raises(TrainingError, match=rf"gave {N - 1} log-probs for {N} sampled tokens"):
        objective.begin(TRAJECTORIES)


def test_an_unknown_divergence_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reverse_kl"):
        objective_for(toy_config(tmp_path, divergence="revrse_kl"), Remote(), VOCABULARY)


def test_joined_values_keep_their_order():
    parts = [TokenValues(*(torch.tensor([float(n), n + 0.5]) for _ in range(7))) for n in range(3)]
    assert TokenValues.joined(parts).kl_N.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]


@pytest.mark.parametrize("budget", [1, 30])
@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_weights_rewards_and_baselines_do_not_depend_on_the_split_into_micro_batches(tmp_path, budget, estimator):
    settings = {
        "estimator": estimator, "divergence": "jsd", "weight_scheme": "sod", "reward_coefficient": 0.5,
        "token_weights": TokenWeights(token_decay=0.9), "samples_per_problem": 4, "topk_tokens": 5,
    }  # fmt: skip
    if estimator == "sampled":
        settings |= {"baseline": "value", "gamma": 0.5, "truncate_weight": 2.0}
    group = [replace(one, example_id="one", sample=n, correct=n == 2) for n, one in enumerate(TRAJECTORIES)]
    whole, one_batch, _ = gradient_of(toy_config(tmp_path, **settings), student(), group)
    parts, split, _ = gradient_of(toy_config(tmp_path, **settings), student(), group, budget=budget)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(split.tokens.advantages_N, one_batch.tokens.advantages_N)
    assert whole["lm_head.weight"].abs().max() > 0
