"""The Task contract: indexing, splits, and the refusal to train on a split that measures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from opd_env.messages import Message, user
from opd_env.tasks import Example, Grade, Task, grade_number, require_trainable


class Double(Task):
    version = "1"
    splits = ("train", "validation", "test")

    def __len__(self) -> int:
        return 5

    def example(self, index: int) -> Example:
        return Example(id=str(index), messages=(user(f"What is {index} times 2?"),), answer=str(2 * index))

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        return grade_number(answer, example.answer)


def ids(examples):
    return [example.id for example in examples]


def test_a_task_is_a_sequence():
    task = Double()
    assert ids(task) == ["0", "1", "2", "3", "4"]
    assert ids(reversed(task)) == ["4", "3", "2", "1", "0"]
    assert ids(task[1:4:2]) == ["1", "3"]
    assert task[-1].id == "4"


@pytest.mark.parametrize("index", [5, -6])
def test_an_index_out_of_range_is_refused_with_the_length(index):
    with pytest.raises(IndexError, match=f"Double has 5 examples, no number {index}"):
        Double()[index]


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"is named 'tset' \(did you mean 'test'\?\); known: train, validation, test"):
        Double("tset")


def test_a_task_without_an_expert_says_none():
    task = Double()
    assert task.expert(task[0]) is None


def test_every_example_has_the_tools_of_the_task_unless_the_task_says_otherwise():
    class OwnTools(Double):
        tools = ("calculator",)

        def tools_of(self, example):
            return ("search",) if example.id == "3" else super().tools_of(example)

    task = OwnTools()
    assert [task.tools_of(example) for example in task[2:4]] == [("calculator",), ("search",)]


def test_only_training_splits_may_be_trained_on():
    require_trainable(Double("train"))
    for split in ("validation", "test"):
        assert not Double(split).train_allowed
        with pytest.raises(ValueError, match=f"split '{split}' of task 'Double' is for evaluation.*'train'"):
            require_trainable(Double(split))


def test_a_task_of_which_nothing_may_be_trained_on_says_so():
    class Benchmark(Double):
        train_splits = ()

    with pytest.raises(ValueError, match="nothing of this task may be trained on"):
        require_trainable(Benchmark("train"))


def test_importing_the_package_loads_no_task_and_no_model_library():
    code = (
        "import sys, opd_env.tasks; "
        "heavy = {'torch', 'datasets', 'transformers', 'bm25s', 'numpy'} & set(sys.modules); "
        "tasks = {m for m in sys.modules if m.startswith('opd_env.tasks.')}; "
        "print(sorted(heavy), sorted(tasks))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = ["base", "graders", "graders.answers", "registry"]
    assert printed.strip() == f"[] {[f'opd_env.tasks.{module}' for module in modules]}"
