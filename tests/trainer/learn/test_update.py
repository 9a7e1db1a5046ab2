"""One update is the same update however it is split over micro-batches, padding and processes."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator

from opd_env.errors import TrainingError
from opd_env.trainer.batch import PolicyModule
from opd_env.trainer.learn.settings import Schedule
from opd_env.trainer.learn.update import Updater, learning_rate_at
from opd_env.trainer.run.sft import supervised_objective
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.toy import made_trajectory, naive_logprobs, row_of, rows_of, targets_of

VOCABULARY = len(tiny_tokenizer())
TRAJECTORIES = [made_trajectory(seed, prompt=3 + seed, turns=(1 + seed % 4, 2)) for seed in range(7)]


def updater_of(model, budget=10_000, **keywords):
    return Updater(PolicyModule(model, VOCABULARY), Accelerator(), tokens_per_microbatch=budget, **keywords)


def double_model():
    return tiny_llama(seed=3, initializer_range=0.2).double()


def test_loss_and_gradient_norm_equal_a_naive_computation():
    model = double_model()
    reference = copy.deepcopy(model)
    picked_N = naive_logprobs(reference, rows_of(TRAJECTORIES)).gather(1, targets_of(TRAJECTORIES)[:, None])
    loss = -picked_N.mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
    update = updater_of(model).update([row_of(one) for one in TRAJECTORIES], supervised_objective, 1e-3)
    assert update.loss == pytest.approx(loss.item(), rel=1e-6)
    assert update.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    assert update.num_tokens == len(picked_N)
    assert update.learning_rate == 1e-3


@pytest.mark.parametrize("budget", [1, 25, 60])
@pytest.mark.parametrize("order", [1, -1])
def test_neither_the_split_nor_the_order_of_rows_changes_the_weights(budget, order):
    models = double_model(), double_model()
    rows = [row_of(one) for one in TRAJECTORIES]
    whole, split = updater_of(models[0]), updater_of(models[1], budget)
    for _ in range(3):
        whole.update(rows, supervised_objective, 1e-2)
        split.update(rows[::order], supervised_objective, 1e-2)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=name)


def test_context_tokens_get_no_weight():
    """Changing what is not sampled after the last sampled token changes nothing at all."""
    one = made_trajectory(1, turns=(3,))
    row = row_of(one)
    longer = type(row)(
        torch.cat([torch.from_numpy(row.token_ids_T), torch.tensor([9, 9], dtype=torch.int32)]).numpy(),
        torch.cat([torch.from_numpy(row.sampled_T), torch.tensor([False, False])]).numpy(),
    )
    models = double_model(), double_model()
    for model, given in zip(models, (row, longer), strict=True):
        updater_of(model).update([given], supervised_objective, 1e-2)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_gradients_are_scaled_down_to_the_bound():
    model = double_model()
    before = copy.deepcopy(model)
    updater = updater_of(model, max_grad_norm=1e-12)
    update = updater.update([row_of(TRAJECTORIES[0])], supervised_objective, 1.0)
    assert update.grad_norm > 0.1
    # AdamW divides by the gradient's own size plus 1e-8: a gradient of 1e-12 moves weights by less than 1e-3.
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_no_sampled_token_is_an_error():
    empty = row_of(TRAJECTORIES[0])
    empty = type(empty)(empty.token_ids_T, empty.sampled_T & False)
    with pytest.raises(TrainingError, match="no token was sampled"):
        updater_of(double_model()).update([empty], supervised_objective, 1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_takes_no_step(bad):
    model = double_model()
    before = copy.deepcopy(model.state_dict())
    updater = updater_of(model)
    with pytest.raises(TrainingError, match="this update was not taken; lower learning_rate"):
        updater.update([row_of(TRAJECTORIES[0])], lambda batch, hidden, head, n: hidden.sum() * bad, 1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert updater.updates == 0
    updater.update([row_of(TRAJECTORIES[0])], supervised_objective, 1e-3)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_learning_rates_follow_warm_up_and_schedule():
    def rates(schedule):
        return [learning_rate_at(u, peak=1.0, warmup=2, total=6, schedule=schedule) for u in range(6)]

    assert rates(Schedule.CONSTANT) == [0.5, 1, 1, 1, 1, 1]
    assert rates(Schedule.LINEAR) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates(Schedule.COSINE) == pytest.approx([0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
