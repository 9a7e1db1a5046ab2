"""Questions about a world: their answers follow from its figures, and no question is in two splits."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from opd_env.tasks.countries.questions import (
    LEVELS,
    MOST_NEIGHBOURS,
    Country,
    all_questions,
    fictional_world,
    real_world,
)
from opd_env.tasks.data.splits import split_of


def questions_by_kind(world, split="train", seed=0):
    return {kind: list(found) for kind, found in all_questions(world, split, random.Random(seed)).items()}


@pytest.fixture(scope="module", params=["fictional", "real"])
def world(request):
    if request.param == "fictional":
        return fictional_world(0, "validation")
    pytest.importorskip("countryinfo", reason="needs the extra 'countries'")
    return real_world()


@pytest.fixture(scope="module")
def kinds(world):
    return questions_by_kind(world, "validation")


@pytest.fixture(scope="module")
def questions(kinds):
    return [question for found in kinds.values() for question in found]


def test_every_kind_of_question_is_there_at_its_level(kinds):
    assert list(kinds) == list(LEVELS)
    for kind, found in kinds.items():
        assert {(question.kind, question.level) for question in found} == {(kind, LEVELS[kind])}


def test_the_random_numbers_only_choose_the_order():
    world = fictional_world(0, "train")
    ours, same, theirs = (questions_by_kind(world, seed=seed) for seed in (0, 0, 1))
    assert ours == same != theirs
    for kind, found in ours.items():
        assert set(found) == set(theirs[kind])


def test_no_question_is_asked_twice(questions):
    texts = [question.text for question in questions]
    assert len(set(texts)) == len(texts)


def test_the_sum_gives_the_answer(questions):
    for question in questions:
        if question.expression is None:
            assert question.kind == "value"
        elif "density" in question.kind:
            people, area = map(int, question.expression.split("/"))
            assert abs(Fraction(people, area) - int(question.answer)) < Fraction(1, 2)
            assert int(question.answer) >= 1
        else:
            first, *others = map(int, question.expression.replace("-", "+-").split("+"))
            assert first + sum(others) == int(question.answer) > 0


def test_every_number_of_the_sum_is_in_a_passage_that_is_looked_up(world, questions):
    by_name = {country.name: country for country in world}
    for question in questions:
        looked_up = [search.passage for search in question.searches]
        figures = set()
        for passage in looked_up:
            name, _, kind = passage.rpartition("/")
            if kind == "statistics":
                figures |= {by_name[name].population, by_name[name].area}
        numbers = (question.expression or question.answer).replace("-", "+").replace("/", "+").split("+")
        assert {int(number) for number in numbers} <= figures
        assert len(set(looked_up)) == len(looked_up)


def test_a_question_by_capital_does_not_name_the_country():
    for kind, found in questions_by_kind(fictional_world(0, "test"), "test").items():
        if kind.endswith("_by_capital"):
            for question in found:
                for search in question.searches:
                    assert search.passage.rpartition("/")[0] not in question.text


def test_a_sum_over_neighbours_is_over_two_to_four(kinds):
    for question in kinds["neighbours"]:
        assert 2 <= question.expression.count("+") + 1 <= MOST_NEIGHBOURS
        assert len(question.searches) == question.expression.count("+") + 2


def test_only_countries_of_the_split_are_asked_about(world, kinds):
    own = {country.name for country in world if split_of(country.name) == "validation"}
    asked = {question.searches[0].passage.partition("/")[0] for found in kinds.values() for question in found}
    assert asked == own


def test_a_density_halfway_between_two_whole_numbers_is_not_asked():
    name = next(name for name in ("Osisand", "Barelia", "Kelovia") if split_of(name) == "train")

    def densities(population):
        country = Country(name, "the Sea", population, 10, None, None, ())
        return [question.answer for question in questions_by_kind([country])["density"]]

    assert densities(24) == ["2"]
    assert densities(26) == ["3"]
    assert densities(25) == []
    assert densities(9) == []
    assert densities(20) == ["2"]


def test_equal_figures_have_no_difference_to_ask_for():
    names = [f"Land{letter}" for letter in "abcdefghijklmnop" if split_of(f"Land{letter}") == "train"][:2]
    twins = [Country(name, "the Sea", 20, 10, None, None, ()) for name in names]
    kinds = questions_by_kind(twins)
    assert kinds["difference"] == []
    assert len(kinds["total"]) == 2


def test_all_pairs_are_asked_for():
    world = fictional_world(0, "test")
    assert len(questions_by_kind(world, "test")["total"]) == 2 * math.comb(len(world), 2)
