"""Country search: every expert verifies with the real tools; splits share nothing; same in every process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from opd_env.messages import calls_of
from opd_env.tasks import load_task, require_trainable
from opd_env.tasks.countries.country_search import SIZES
from opd_env.tasks.countries.questions import fictional_world, passages, real_world
from opd_env.tools import Toolbox

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module", params=["fictional", "real"])
def world(request):
    if request.param == "real":
        pytest.importorskip("countryinfo", reason="needs the extra 'countries'")
    return request.param


def questions(task):
    return {example.messages[-1]["content"] for example in task}


@pytest.mark.parametrize("split", SPLITS)
def test_every_expert_verifies_with_the_real_tools(world, split):
    task = load_task("country_search", split, world=world)
    countries = real_world() if world == "real" else fictional_world(0, split)
    texts = {passage["id"]: passage["text"] for passage in passages(countries)}
    with Toolbox(load_task("country_search", split, world=world).tools) as toolbox:
        for example in task[:: len(task) // 150]:
            *calls, final = task.expert(example)
            read = ""
            searches = iter(example.metadata["searches"])
            for turn, answer in zip(calls[::2], calls[1::2], strict=True):
                (call,) = calls_of(turn)
                result = toolbox.call(call.name, call.arguments)
                assert result.ok
                assert result.content == answer["content"]
                if call.name == "search":
                    assert texts[next(searches)[1]] in result.content
                    read += result.content
                else:
                    assert set(call.arguments["expression"].replace("-", "+").replace("/", "+").split("+")) <= set(
                        read.split()
                    ), "the expert computes with a number that it has not read"
            assert next(searches, None) is None
            assert task.grade(example, final["content"]).correct


def test_the_calculator_gives_the_answer(world):
    task = load_task("country_search", "test", world=world)
    for example in task:
        results = [m["content"] for m in task.expert(example) if m["role"] == "tool" and m["name"] == "calculator"]
        if example.metadata["expression"] is None:
            assert results == []
        else:
            assert abs(float(results[-1]) - int(example.answer)) <= 0.5 * ("/" in example.metadata["expression"])


def test_no_question_of_one_split_is_in_another_whatever_the_seeds(world):
    seen = {split: set() for split in SPLITS}
    for seed in (0, 1):
        for split in SPLITS:
            task = load_task("country_search", split, world=world, seed=seed)
            assert len(questions(task)) == len(task) <= SIZES[split]
            assert len({example.id for example in task}) == len(task)
            seen[split] |= questions(task)
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_a_made_up_split_is_full_and_has_all_levels():
    for split in SPLITS:
        task = load_task("country_search", split)
        assert len(task) == SIZES[split]
        assert {example.difficulty for example in task} == {1, 2, 3}
        assert {example.difficulty for example in task[:8]} == {1, 2, 3}


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_level_can_be_chosen(level):
    task = load_task("country_search", "test", levels=[level])
    assert {example.difficulty for example in task} == {level}
    assert len(task) >= 150


def test_another_seed_asks_about_another_world():
    ours, theirs = (questions(load_task("country_search", "test", seed=seed)) for seed in (0, 1))
    assert len(ours & theirs) < len(ours) / 10


@pytest.mark.parametrize("hash_seed", ["0", "4321"])
def test_the_examples_are_the_same_in_every_process(hash_seed):
    code = (
        "import json; from opd_env.tasks import load_task; task = load_task('country_search', 'test', seed=5); "
        "print(json.dumps([[e.id, e.messages, e.answer, e.metadata, task.expert(e)] for e in task[:50]]))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": hash_seed},
    ).stdout
    task = load_task("country_search", "test", seed=5)
    ours = [[e.id, e.messages, e.answer, e.metadata, task.expert(e)] for e in task[:50]]
    assert json.loads(printed) == json.loads(json.dumps(ours))


def test_the_text_of_a_published_version_does_not_change():
    task = load_task("country_search", "test")
    assert [task[index].messages[-1]["content"] for index in (0, 2)] == [
        "What is the land area of Elimand in square kilometres?",
        "By how many square kilometres is the land area of Alirand larger than that of Moreruna?",
    ], "a published version has changed: raise `version`"


def test_the_task_searches_its_own_passages():
    task = load_task("country_search", "test")
    search, calculator = task.tools
    name = fictional_world(0, "test")[0].name
    with Toolbox([search, calculator]) as toolbox:
        assert f"{name} has a population of" in toolbox.call("search", {"query": f"population of {name}"}).content
        assert toolbox.call("search", {"query": "France"}).content == "no results"


def test_only_the_training_split_may_be_trained_on():
    require_trainable(load_task("country_search"))
    with pytest.raises(ValueError, match="split 'test' of task 'country_search' is for evaluation only"):
        require_trainable(load_task("country_search", "test"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world": "flat"}, "world='flat': expected 'fictional' or 'real'"),
        ({"levels": []}, r"levels=\[\]: expected a list of some of \[1, 2, 3\]"),
        ({"levels": [1, 4]}, r"levels=\[1, 4\]: expected"),
        ({"levels": 3}, "levels=3: expected a list"),
        ({"levels": "12"}, "levels='12': expected a list"),
        ({"split": "dev"}, r"no split of CountrySearch is named 'dev'; known: train, validation, test"),
    ],
)
def test_an_impossible_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_task("country_search", **options)


def test_the_real_world_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "countryinfo", None)
    with pytest.raises(ImportError, match="pip install"):
        load_task("country_search", world="real")
