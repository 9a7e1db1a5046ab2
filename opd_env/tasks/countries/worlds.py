"""Countries to ask about, real or made up, and the passages that describe them.

Worked example::

    countries = fictional_world(seed=0, split="test")
    countries[0]             # Country(name='Moradand', region='the Northern Plain', population=…)
    passages(countries)[1]   # {'id': 'Moradand/statistics', 'title': 'Statistics of Moradand', 'text': '…'}

A made-up world needs nothing and cannot be known by heart: only the search tool has the answers. The real one
needs ``countryinfo`` (MIT); its figures are that package's and some years old.

Test it alone: ``pytest tests/tasks/countries/test_worlds.py``
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
