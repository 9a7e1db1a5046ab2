"""The order of problems is known by its seed, and every pass holds every problem once."""

from hypothesis import given
from hypothesis import strategies as st

from opd_env.tasks import load_task
from opd_env.trainer.run.rollouts import StepProblems, problem_at


@given(size=st.integers(1, 40), epoch=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_every_pass_holds_every_problem_once(size, epoch, seed):
    places = range(epoch * size, (epoch + 1) * size)
    assert sorted(problem_at(place, size, seed) for place in places) == list(range(size))


def test_passes_and_seeds_differ_and_places_can_be_asked_in_any_order():
    def order(seed, epoch):
        return [problem_at(place, 50, seed) for place in range(50 * epoch, 50 * epoch + 50)]

    first = order(0, 0)
    assert first != order(0, 1) != order(1, 1)
    assert [problem_at(place, 50, 0) for place in reversed(range(50))] == first[::-1]


def test_training_takes_a_curriculum_in_its_order_and_shuffles_other_tasks():
    task = load_task("curriculum", "test", task="arithmetic")
    problems = StepProblems(task, per_step=300, samples=1, seed=0)
    assert problems.of_step(0) == [(index, 0) for index in range(300)]
    assert problems.of_step(3)[99:101] == [(999, 0), (0, 0)]
    shuffled = StepProblems(load_task("arithmetic", "test"), per_step=300, samples=1, seed=0).of_step(0)
    assert shuffled != [(index, 0) for index in range(300)]
