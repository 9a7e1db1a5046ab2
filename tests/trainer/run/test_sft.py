"""The warm start imitates experts' own tokens, and only experts that hold."""

import pytest
import torch
from accelerate import Accelerator

from opd_env.formats import get_format
from opd_env.tasks import load_task
from opd_env.trainer.batch import PolicyModule
from opd_env.trainer.learn.settings import Schedule
from opd_env.trainer.learn.update import Updater
from opd_env.trainer.run.rollouts import problem_at
from opd_env.trainer.run.sft import expert_trajectories, sft, supervised_objective
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.toy import ToySums, row_of


@pytest.fixture(scope="module")
def chat():
    return get_format(tiny_tokenizer())


def updater():
    return Updater(PolicyModule(tiny_llama(seed=3), len(tiny_tokenizer())), Accelerator())


def test_experts_are_played_through_the_real_tools(chat):
    experts = expert_trajectories(load_task("toy_sums"), chat, count=5)
    assert len({one.example_id for one in experts}) == 5
    for one in experts:
        assert one.correct
        assert [call.error for call in one.calls] == [None]
        assert one.calls[0].output == one.answer.removeprefix("The answer is ").removesuffix(".")


def test_the_student_learns_to_write_what_the_expert_wrote(chat):
    experts = expert_trajectories(load_task("toy_sums"), chat, count=4)
    losses = [
        update.loss for update in sft(updater(), experts, steps=25, episodes_per_step=4, learning_rate=1e-2, seed=1)
    ]
    assert len(losses) == 25
    assert losses[0] == pytest.approx(5.6, abs=0.2)  # ln 271: a random student
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_takes_its_episodes_in_the_known_order_at_the_known_rate(chat):
    experts = expert_trajectories(load_task("toy_sums"), chat, count=6)
    one, other = updater(), updater()
    shown = list(
        sft(one, experts, steps=4, episodes_per_step=4, learning_rate=1e-3, warmup=2, schedule=Schedule.LINEAR, seed=7)
    )
    for step, rate in enumerate([5e-4, 1e-3, 1e-3, 5e-4]):
        rows = [row_of(experts[problem_at(place, 6, 7)]) for place in range(4 * step, 4 * step + 4)]
        assert shown[step].learning_rate == rate
        other.update(rows, supervised_objective, rate)
    for name, value in one.parameters.items():
        assert torch.equal(value, other.parameters[name]), name


def test_a_split_that_is_there_to_measure_with_is_refused(chat):
    with pytest.raises(ValueError, match="is for evaluation only"):
        expert_trajectories(load_task("toy_sums", "test"), chat, count=1)


def test_a_task_without_experts_is_refused(chat):
    class Silent(ToySums):
        name = "silent"

        def expert(self, example):
            return None

    with pytest.raises(ValueError, match="'silent' has no expert whose calls all work"):
        expert_trajectories(Silent(), chat, count=3)
