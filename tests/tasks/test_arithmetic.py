"""Generated word problems: deterministic, disjoint, solvable by the expert with the real calculator."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from itertools import product

import pytest

from opd_env.messages import calls_of
from opd_env.tasks import arithmetic, load_task
from opd_env.tasks.arithmetic import KINDS, LARGEST, SIZES, Arithmetic, split_of
from opd_env.tools import Toolbox

ALL_LEVELS = (1, 2, 3)


def questions(task):
    return [example.messages[0]["content"] for example in task]


@pytest.fixture(scope="module")
def problems():
    return Arithmetic("test", levels=ALL_LEVELS)


def test_an_example_is_a_pure_function_of_its_coordinates():
    first, second = (Arithmetic("test", levels=ALL_LEVELS, seed=3) for _ in range(2))
    assert list(first) == list(second)
    assert first[0].messages[0]["content"] == (
        "Ben has 368 stamps and gets 247 more. How many stamps does Ben have now?"
    ), "the text of a published version has changed: raise `version`"


def digest(task):
    rows = [[e.id, e.messages, e.answer, e.difficulty, e.metadata] for e in task]
    return hashlib.sha256("".join(map(json.dumps, rows)).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("split", "levels", "expected"),
    [
        ("train", (1, 2), "5729dea38fd9749b"),
        ("validation", (1, 2, 3), "2aa4edc7d79b8bdd"),
        ("test", (1, 2), "8ed56b5773d2483b"),
        ("test", (3,), "1c8236f25cbbec91"),
    ],
)
def test_the_published_examples_are_the_same_to_the_byte(split, levels, expected):
    assert digest(Arithmetic(split, levels=levels)) == expected, "a published version has changed: raise `version`"


def test_examples_do_not_depend_on_the_order_in_which_they_are_asked_for():
    in_order = list(Arithmetic("test", seed=11))
    arithmetic._problems.cache_clear()
    task = Arithmetic("test", seed=11)
    assert [task[index] for index in (700, 3, 999, 701)] == [in_order[index] for index in (700, 3, 999, 701)]


def test_a_task_is_small_to_copy_to_another_process():
    task = Arithmetic("train")
    assert len(pickle.dumps(task)) < 1_000
    assert pickle.loads(pickle.dumps(task))[5] == task[5]


def test_another_seed_gives_other_problems():
    ours, theirs = (questions(Arithmetic("test", seed=seed)) for seed in (0, 1))
    assert len(set(ours) & set(theirs)) < len(ours) / 10


def test_no_question_of_one_split_is_in_another_whatever_the_seeds():
    seen = {
        split: {text for seed, levels in product((0, 1), ((1, 2), (1,))) for text in questions(
            Arithmetic(split, levels=levels, seed=seed))}
        for split in SIZES
    }  # fmt: skip
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


@pytest.mark.parametrize("split", SIZES)
def test_a_split_repeats_neither_a_question_nor_an_id(split):
    task = Arithmetic(split)
    assert len(task) == SIZES[split]
    assert len(set(questions(task))) == len({example.id for example in task}) == len(task)
    assert {split_of(example.id) for example in task} == {split}


def test_difficulty_counts_the_steps_and_levels_select_it(problems):
    assert {example.difficulty for example in problems} == set(ALL_LEVELS)
    for example in problems:
        assert example.difficulty == len(example.metadata["steps"])
    assert {example.difficulty for example in Arithmetic("test", levels=[2])} == {2}
    assert {example.difficulty for example in Arithmetic("test")} == {1, 2}


def test_every_kind_takes_its_turn(problems):
    assert {example.metadata["kind"] for example in problems[: len(KINDS)]} == {kind.name for kind in KINDS}


def test_the_question_shows_exactly_the_operands_that_no_step_computes(problems):
    for example in problems:
        numbers = re.findall(r"\d+", example.messages[0]["content"])
        operands = [number for expression, _ in example.metadata["steps"] for number in re.findall(r"\d+", expression)]
        results = [result for _, result in example.metadata["steps"]]
        assert sorted(numbers) == sorted(set_aside(operands, results[:-1]))
        assert all(1 <= int(number) <= LARGEST for number in numbers + list(results))


def set_aside(operands, results):
    """The operands without those that are results of earlier steps, one for each."""
    left = list(operands)
    for result in results:
        left.remove(result)
    return left


def test_the_real_calculator_gives_every_result_that_the_expert_expects(problems):
    with Toolbox(problems.tools) as toolbox:
        for example in problems[:60]:
            turns = problems.expert(example)
            for message, answer in zip(turns[:-1:2], turns[1::2], strict=True):
                (call,) = calls_of(message)
                result = toolbox.call(call.name, call.arguments)
                assert result.ok, result.content
                assert result.content == answer["content"]


def test_the_expert_calls_once_a_step_and_its_answer_is_graded_right(problems):
    for example in problems:
        turns = problems.expert(example)
        roles = [message["role"] for message in turns]
        assert roles == ["assistant", "tool"] * example.difficulty + ["assistant"]
        assert problems.grade(example, turns[-1]["content"]).correct


def test_wrong_and_missing_answers_are_graded_wrong(problems):
    example = problems[0]
    for answer in (
        f"The answer is {int(example.answer) + 1}.",
        f"The answer is {example.answer}0.",
        "",
        None,
    ):
        assert not problems.grade(example, answer).correct


@pytest.mark.parametrize("levels", [(), (0,), (1, 4)])
def test_levels_that_do_not_exist_are_refused(levels):
    with pytest.raises(ValueError, match=r"levels=.*expected some of \[1, 2, 3\]"):
        load_task("arithmetic", levels=levels)


def test_a_split_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"no split of Arithmetic is named 'dev'; known: train, validation, test"):
        load_task("arithmetic", split="dev")


def test_only_the_training_split_may_be_trained_on():
    assert [split for split in SIZES if load_task("arithmetic", split=split).train_allowed] == ["train"]
