"""Mixtures keep their shares at every length and their problems' graders; curricula go from easy to hard."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.episode.env import ToolEnv
from opd_env.tasks import load_task, require_trainable
from opd_env.tasks.mixture import schedule
from opd_env.tools import Toolbox

TASKS = [{"task": "arithmetic", "weight": 3, "levels": [1]}, {"task": "country_search", "label": "search"}]


@pytest.fixture(scope="module")
def mixture():
    return load_task("mixture", "test", tasks=TASKS)


def test_ids_are_unique_and_shares_are_those_of_the_weights(mixture):
    ids = [example.id for example in mixture]
    assert len(ids) == len(set(ids))
    counts = Counter(identity.partition("/")[0] for identity in ids[:400])
    assert counts == {"arithmetic": 300, "search": 100}
    assert {example.metadata["category"] for example in mixture} == {"arithmetic", "search"}
    assert not mixture.train_allowed
    assert load_task("mixture", "train", tasks=TASKS).train_allowed


@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.1, 10)), min_size=1, max_size=5),
)
def test_every_start_of_a_mixture_has_the_shares_of_the_weights(parts):
    lengths, weights = zip(*parts, strict=True)
    task_M, index_M = schedule(lengths, weights)
    assert len(set(zip(task_M.tolist(), index_M.tolist(), strict=True))) == len(task_M)
    share = np.array(weights) / sum(weights)
    counts = np.zeros(len(parts))
    for place, (task, index) in enumerate(zip(task_M, index_M, strict=True), start=1):
        assert index == counts[task] < lengths[task]
        counts[task] += 1
        assert np.abs(counts - place * share).max() <= max(1, len(parts) / 2)


def test_problems_keep_tools_grader_and_expert(mixture):
    for index in range(8):
        example = mixture[index]
        label = example.id.partition("/")[0]
        assert mixture.grade(example, f"The answer is {example.answer}.").correct
        assert not mixture.grade(example, "no").correct
        names = [tool.name for tool in Toolbox(mixture.tools_of(example))]
        assert names == (["calculator"] if label == "arithmetic" else ["search", "calculator"])
        assert mixture.expert(example)[-1]["content"] == f"The answer is {example.answer}."
        json.dumps(example.metadata)
        env = ToolEnv(mixture)
        _, info = env.reset(options={"index": index})
        assert [schema["function"]["name"] for schema in info["tools"]] == names
        assert env.step(example.answer)[4]["grade"].correct


def test_the_same_coordinates_give_the_same_examples(mixture):
    assert [example.id for example in load_task("mixture", "test", tasks=TASKS)] == [example.id for example in mixture]
    assert [example.id for example in load_task("mixture", "test", tasks=TASKS, size=50)] == [
        example.id for example in mixture[:50]
    ]


def test_a_part_for_evaluation_makes_the_mixture_one():
    parts = [{"task": "arithmetic"}, {"task": "country_search", "split": "test"}]
    with pytest.raises(ValueError, match="for evaluation only"):
        require_trainable(load_task("mixture", tasks=parts))


def test_the_version_follows_those_of_its_tasks(mixture):
    assert mixture.version == "1 (arithmetic 1, search 1)"
    assert mixture.licence == "Apache-2.0"


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "tasks is empty"),
        (["arithmetic"], r"tasks: got 'arithmetic', expected \{task: name"),
        ([{"task": "arithmetic"}, {"task": "arithmetic"}], "two are called 'arithmetic'; give one a label"),
        ([{"task": "arithmetic", "weight": 0}], "arithmetic: weight=0, expected a number above 0"),
        ([{"task": "arithmetic", "wieght": 2}], "no option of task 'arithmetic' is named 'wieght'"),
    ],
)
def test_mistakes_are_named(tasks, message):
    with pytest.raises(ValueError, match=message):
        load_task("mixture", tasks=tasks)


def test_a_size_that_the_tasks_cannot_give_is_refused():
    with pytest.raises(ValueError, match=r"size=5000, but with these weights the tasks give 1 to 1000 problems"):
        load_task("mixture", "test", tasks=[{"task": "arithmetic"}], size=5000)


def test_a_curriculum_goes_from_easy_to_hard_and_loses_nothing():
    plain = load_task("arithmetic", "test", levels=[1, 2, 3])
    task = load_task("curriculum", "test", task="arithmetic", levels=[1, 2, 3])
    levels = [example.difficulty for example in task]
    assert levels == sorted(levels)
    assert set(levels) == {1, 2, 3}
    assert {example.id for example in task} == {example.id for example in plain}
    assert [example.id for example in task] != sorted(e.id for e in plain)
    other = load_task("curriculum", "test", task="arithmetic", levels=[1, 2, 3], seed=1)
    assert [example.id for example in other] != [example.id for example in task]
    assert task.grade(task[0], task[0].answer).correct
    assert (task.version, task.tools, task.licence) == ("1 (arithmetic 1)", ("calculator",), "Apache-2.0")
