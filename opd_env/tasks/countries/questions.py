"""All questions that a world's countries allow, each with the searches and the sum that answer it.

Worked example::

    kinds = all_questions(fictional_world(0, "test"), "test", random.Random(0))
    next(kinds["difference"])
    # Question(kind='difference', text='How many more people live in Velimand than in Osenara?',
    #          searches=(Search('population and land area of Velimand', 'Velimand/statistics'), …),
    #          expression='63599305-366981', answer='63232324')

Test it alone: ``pytest tests/tasks/countries/test_questions.py``
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, product
from typing import NamedTuple, TypeVar

from opd_env.tasks.countries.worlds import Country
from opd_env.tasks.data.splits import split_of

LEVELS = {
    "value": 1,
    "density": 1,
    "difference": 2,
    "total": 2,
    "density_by_capital": 2,
    "difference_by_capital": 3,
    "total_by_capital": 3,
    "neighbours": 3,
}
"""Kinds of question, and how hard they are."""
MOST_NEIGHBOURS = 4
"""Countries with more are not asked for the sum over their neighbours."""

STATISTICS_QUERY = "population and land area of {name}"
"""How the expert looks up a figure: both words, so that a long name does not outweigh them."""
VALUE = {
    "population": "What is the population of {a}?",
    "area": "What is the land area of {a} in square kilometres?",
}
DIFFERENCE = {
    "population": "How many more people live in {a} than in {b}?",
    "area": "By how many square kilometres is the land area of {a} larger than that of {b}?",
}
TOTAL = {
    "population": "What is the total population of {a} and {b}?",
    "area": "What is the combined land area of {a} and {b} in square kilometres?",
}
NEIGHBOURS = {
    "population": "What is the total population of all countries that border {a}?",
    "area": "What is the combined land area in square kilometres of all countries that border {a}?",
}
DENSITY = "How many people per square kilometre live in {a}? Round to the nearest whole number."


T = TypeVar("T")


class Search(NamedTuple):
    """One look-up."""

    query: str
    passage: str
    """Id of the passage that must be among the results."""


@dataclass(frozen=True)
class Question:
    """A question and its solution."""

    kind: str
    text: str
    searches: tuple[Search, ...]
    expression: str | None
    """What the calculator is asked; None when a passage states the answer."""
    answer: str

    @property
    def level(self) -> int:
        """How hard the question's kind is."""
        return LEVELS[self.kind]


@dataclass(frozen=True)
class _Subject:
    """A country as a question refers to it."""

    country: Country
    phrase: str
    searches: tuple[Search, ...] = ()
    """What must be looked up before the country's name is known."""


def all_questions(countries: Sequence[Country], split: str, rng: random.Random) -> dict[str, Iterator[Question]]:
    """For each kind, all questions about those countries that belong to ``split``, in random order.

    Neighbours of a country may belong to any split: they are looked up, not asked about.
    """
    by_name = {country.name: country for country in countries}
    own = [country for country in countries if split_of(country.name) == split]
    named = [_Subject(country, country.name) for country in own]
    by_capital = [
        _Subject(
            country,
            f"the country whose capital is {country.capital}",
            (Search(f"capital {country.capital}", f"{country.name}/capital"),),
        )
        for country in own
        if country.capital
    ]
    return {
        "value": _values(_shuffled(product(named, VALUE), rng)),
        "density": _densities("density", _shuffled(named, rng)),
        "difference": _differences("difference", _shuffled(_pairs(named, DIFFERENCE), rng)),
        "total": _totals("total", _shuffled(_pairs(named, TOTAL), rng)),
        "density_by_capital": _densities("density_by_capital", _shuffled(by_capital, rng)),
        "difference_by_capital": _differences("difference_by_capital", _shuffled(_pairs(by_capital, DIFFERENCE), rng)),
        "total_by_capital": _totals("total_by_capital", _shuffled(_pairs(by_capital, TOTAL), rng)),
        "neighbours": _neighbours(_shuffled(product(own, NEIGHBOURS), rng), by_name),
    }


def _pairs(subjects: Sequence[_Subject], attributes: Iterable[str]) -> Iterator[tuple[tuple[_Subject, _Subject], str]]:
    return product(combinations(subjects, 2), attributes)


def _shuffled(items: Iterable[T], rng: random.Random) -> list[T]:
    shuffled = list(items)
    rng.shuffle(shuffled)
    return shuffled


def _look_up(country: Country) -> Search:
    return Search(STATISTICS_QUERY.format(name=country.name), f"{country.name}/statistics")


def _values(subjects: Iterable[tuple[_Subject, str]]) -> Iterator[Question]:
    for subject, attribute in subjects:
        yield Question(
            kind="value",
            text=VALUE[attribute].format(a=subject.phrase),
            searches=(*subject.searches, _look_up(subject.country)),
            expression=None,
            answer=str(getattr(subject.country, attribute)),
        )


def _densities(kind: str, subjects: Iterable[_Subject]) -> Iterator[Question]:
    """People per square kilometre, where that is at least 1 and not halfway between two whole numbers."""
    for subject in subjects:
        country = subject.country
        density = Fraction(country.population, country.area)
        if density >= 1 and density.denominator != 2:
            yield Question(
                kind=kind,
                text=DENSITY.format(a=subject.phrase),
                searches=(*subject.searches, _look_up(country)),
                expression=f"{country.population}/{country.area}",
                answer=str(round(density)),
            )


def _differences(kind: str, pairs: Iterable[tuple[tuple[_Subject, _Subject], str]]) -> Iterator[Question]:
    for pair, attribute in pairs:
        small, large = sorted(pair, key=lambda subject: getattr(subject.country, attribute))
        low, high = getattr(small.country, attribute), getattr(large.country, attribute)
        if low < high:
            text = DIFFERENCE[attribute].format(a=large.phrase, b=small.phrase)
            yield _about_two(kind, text, (large, small), f"{high}-{low}", high - low)


def _totals(kind: str, pairs: Iterable[tuple[tuple[_Subject, _Subject], str]]) -> Iterator[Question]:
    for pair, attribute in pairs:
        first, second = (getattr(subject.country, attribute) for subject in pair)
        text = TOTAL[attribute].format(a=pair[0].phrase, b=pair[1].phrase)
        yield _about_two(kind, text, pair, f"{first}+{second}", first + second)


def _about_two(
    kind: str,
    text: str,
    pair: tuple[_Subject, _Subject],
    expression: str,
    answer: int,
) -> Question:
    """Each country is looked up in the order of the question, by its capital first where need be."""
    searches = [search for subject in pair for search in (*subject.searches, _look_up(subject.country))]
    return Question(kind, text, tuple(searches), expression, str(answer))


def _neighbours(subjects: Iterable[tuple[Country, str]], by_name: dict[str, Country]) -> Iterator[Question]:
    for country, attribute in subjects:
        if 2 <= len(country.borders) <= MOST_NEIGHBOURS:
            beside = [by_name[name] for name in country.borders]
            values = [getattr(neighbour, attribute) for neighbour in beside]
            borders = Search(f"borders of {country.name}", f"{country.name}/borders")
            yield Question(
                kind="neighbours",
                text=NEIGHBOURS[attribute].format(a=country.name),
                searches=(borders, *(_look_up(neighbour) for neighbour in beside)),
                expression="+".join(map(str, values)),
                answer=str(sum(values)),
            )
