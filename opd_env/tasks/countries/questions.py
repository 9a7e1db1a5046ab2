"""Made-up worlds of countries, and all questions that they allow, with the searches and the sum that answer each.

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
from typing import Any, NamedTuple, TypeVar

from opd_env.tasks.data.splits import split_of

REGIONS = ("Northern", "Eastern", "Southern", "Western", "Central", "Outer")
COLUMNS = 5
"""A region is a grid of two rows and this many columns of countries; those side by side share a border."""

_STARTS = (
    "Al", "Bar", "Cor", "Dra", "El", "Fen", "Gal", "Har", "Is", "Jor", "Kel", "Lor",
    "Mor", "Nar", "Os", "Pel", "Quen", "Ral", "Sar", "Tor", "Ul", "Vel", "Wor", "Yar", "Zel",
)  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u")
_CONSONANTS = ("b", "d", "l", "m", "n", "r", "s", "t", "v")
_COUNTRY_ENDINGS = ("ia", "and", "or", "una", "eth", "ara")
_CAPITAL_ENDINGS = ("burg", "dorf", "field", "gate", "mouth", "port", "ton", "ville")


@dataclass(frozen=True)
class Country:
    """What the passages say about one country."""

    name: str
    region: str
    population: int
    """People."""
    area: int
    """Land area in square kilometres."""
    capital: str | None
    """None when there is none, or not exactly one."""
    currency: str | None
    """Its code, such as ``EUR``."""
    borders: tuple[str, ...]
    """Names of the neighbours; they are countries of the same world."""


def fictional_world(seed: int, split: str) -> tuple[Country, ...]:
    """A made-up world of 60 countries, a pure function of (seed, split).

    The names of its countries and capitals belong to ``split`` by ``split_of``, so worlds of different splits
    share none, whatever their seeds.
    """
    rng = random.Random(f"world {seed} {split}")
    cells = [(region, row, column) for region in REGIONS for row in (0, 1) for column in range(COLUMNS)]
    names = _draw_names(rng, len(cells), _COUNTRY_ENDINGS, split)
    capitals = _draw_names(rng, len(cells), _CAPITAL_ENDINGS, split)
    name_at = dict(zip(cells, names, strict=True))
    countries = []
    for (region, row, column), capital in zip(cells, capitals, strict=True):
        beside = [(region, 1 - row, column), (region, row, column - 1), (region, row, column + 1)]
        area = _of_digits(rng, 4, 6)
        countries.append(
            Country(
                name=name_at[region, row, column],
                region=f"the {region} Plain",
                population=area * _of_digits(rng, 1, 3) + rng.randrange(area),
                area=area,
                capital=capital,
                currency=name_at[region, row, column][:3].upper(),
                borders=tuple(name_at[cell] for cell in beside if cell in name_at),
            )
        )
    return tuple(countries)


def real_world() -> tuple[Country, ...]:
    """The countries of the package ``countryinfo`` with a population and a land area, in alphabetical order.

    Of two entries for one ISO code the later stays (Myanmar, not Burma). Names that would be ambiguous within
    a list (with a comma or brackets) are left out.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from countryinfo import CountryInfo
    except ImportError as error:
        raise ImportError(
            "world='real' needs the package countryinfo; install it with: pip install 'opd-env[countries]'"
        ) from error
    entries: dict[str, dict[str, Any]] = {}
    for entry in sorted(CountryInfo.all().values(), key=lambda entry: str(entry["name"])):
        usable = entry.get("population") and entry.get("region") and isinstance(entry.get("area"), int)
        code = entry.get("ISO", {}).get("alpha3")
        if code and usable and not set(entry["name"]) & set(",()"):
            entries[code] = dict(entry)
    capitals = [entry.get("capital") or None for entry in entries.values()]
    return tuple(
        Country(
            name=entry["name"],
            region=entry.get("subregion") or entry["region"],
            population=entry["population"],
            area=entry["area"],
            capital=capital if isinstance(capital, str) and capitals.count(capital) == 1 else None,
            currency=next(iter(entry.get("currencies") or ()), None),
            borders=tuple(entries[code]["name"] for code in entry.get("borders") or () if code in entries),
        )
        for entry, capital in zip(entries.values(), capitals, strict=True)
    )


def passages(countries: Sequence[Country]) -> list[dict[str, str]]:
    """The search tool's documents: each country's overview, statistics, borders and capital."""
    documents = []
    for country in countries:
        name = country.name
        overview = f"{name} is a country in {country.region}."
        if country.capital:
            overview += f" Its capital is {country.capital}."
        if country.currency:
            overview += f" Its currency code is {country.currency}."
        statistics = (
            f"{name} has a population of {country.population} and a land area of {country.area} square kilometres."
        )
        documents.append({"id": f"{name}/overview", "title": name, "text": overview})
        documents.append({"id": f"{name}/statistics", "title": f"Statistics of {name}", "text": statistics})
        documents.append({"id": f"{name}/borders", "title": f"Borders of {name}", "text": borders_text(country)})
        if country.capital:
            text = f"{country.capital} is the capital city of {name}."
            documents.append({"id": f"{name}/capital", "title": country.capital, "text": text})
    return documents


def borders_text(country: Country) -> str:
    """One sentence with all neighbours."""
    if not country.borders:
        return f"{country.name} shares no land border with another country."
    *others, last = country.borders
    return f"{country.name} shares land borders with {', '.join(others) + ' and ' if others else ''}{last}."


def _draw_names(rng: random.Random, count: int, endings: Sequence[str], split: str) -> list[str]:
    """Different names of this split with one of the endings, such as ``Barelia`` or ``Kelonburg``."""
    names: dict[str, None] = {}
    while len(names) < count:
        name = "".join(rng.choice(part) for part in (_STARTS, _VOWELS, _CONSONANTS, endings))
        if split_of(name) == split:
            names[name] = None
    return list(names)


def _of_digits(rng: random.Random, fewest: int, most: int) -> int:
    """A whole number with this many digits. No floating point, so that every machine draws the same."""
    digits = rng.randint(fewest, most)
    return rng.randrange(10 ** (digits - 1), 10**digits)


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
