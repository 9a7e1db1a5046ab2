"""Worlds: made up or real, consistent, the same in every process; passages that state the facts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from opd_env.tasks.countries.questions import Country, fictional_world, passages, real_world
from opd_env.tasks.data.splits import SPLITS, split_of


@pytest.fixture(scope="module", params=["fictional", "real"])
def world(request):
    if request.param == "fictional":
        return fictional_world(0, "train")
    pytest.importorskip("countryinfo", reason="needs the extra 'countries'")
    return real_world()


def test_countries_and_capitals_have_names_of_their_own(world):
    names = [country.name for country in world]
    capitals = [country.capital for country in world if country.capital]
    assert len(set(names)) == len(names) >= 60
    assert len(set(capitals)) == len(capitals) >= 60


def test_figures_are_positive_whole_numbers(world):
    for country in world:
        assert type(country.population) is type(country.area) is int
        assert country.population > 0 < country.area


def test_neighbours_are_other_countries_of_the_same_world(world):
    names = {country.name for country in world}
    for country in world:
        assert set(country.borders) <= names - {country.name}
        assert len(set(country.borders)) == len(country.borders)


def test_a_made_up_border_has_two_sides():
    borders = {country.name: country.borders for country in fictional_world(0, "train")}
    assert all(name in borders[beside] for name, beside_it in borders.items() for beside in beside_it)
    assert {len(beside) for beside in borders.values()} == {2, 3}


def test_worlds_of_different_splits_share_no_country_and_no_capital():
    for seed in range(5):
        for split in SPLITS:
            for country in fictional_world(seed, split):
                assert split_of(country.name) == split_of(country.capital) == split


def test_a_made_up_country_is_none_of_the_real_ones():
    pytest.importorskip("countryinfo", reason="needs the extra 'countries'")
    real = {country.name for country in real_world()} | {country.capital for country in real_world()}
    for seed in range(20):
        for split in SPLITS:
            world = fictional_world(seed, split)
            assert not real & ({country.name for country in world} | {country.capital for country in world})


def test_another_seed_makes_another_world():
    ours, theirs = ({country.name for country in fictional_world(seed, "test")} for seed in (0, 1))
    assert len(ours & theirs) < len(ours) / 2


@pytest.mark.parametrize("hash_seed", ["0", "1234"])
def test_a_world_is_the_same_in_every_process(hash_seed):
    code = "from opd_env.tasks.countries.questions import fictional_world; print(fictional_world(7, 'train'))"
    environment = {"PYTHONHASHSEED": hash_seed}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert printed == f"{fictional_world(7, 'train')}\n"


def test_the_passages_state_every_fact(world):
    texts = {passage["id"]: passage["text"] for passage in passages(world)}
    assert len(texts) == len(passages(world))
    for country in world:
        statistics = texts[f"{country.name}/statistics"]
        assert f" {country.population} " in statistics
        assert f" {country.area} " in statistics
        assert all(name in texts[f"{country.name}/borders"] for name in country.borders)
        if country.capital:
            assert texts[f"{country.name}/capital"] == f"{country.capital} is the capital city of {country.name}."


def test_what_a_country_lacks_is_not_stated():
    island = Country("Osisand", "the Sea", 10, 5, capital=None, currency=None, borders=())
    assert [passage["text"] for passage in passages([island])] == [
        "Osisand is a country in the Sea.",
        "Osisand has a population of 10 and a land area of 5 square kilometres.",
        "Osisand shares no land border with another country.",
    ]


def test_the_real_world_has_one_entry_a_country():
    pytest.importorskip("countryinfo", reason="needs the extra 'countries'")
    names = {country.name for country in real_world()}
    assert {"France", "Myanmar", "Japan"} <= names
    assert not {"Burma", "Antarctica"} & names


def test_the_real_world_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "countryinfo", None)
    with pytest.raises(ImportError, match=r"pip install 'opd-env\[countries\]'"):
        real_world()
