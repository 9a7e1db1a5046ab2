"""Settings: one check of types and bounds, whoever gives the values; unknown names are told where they belong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.cli.play import EvalSettings, RolloutSettings
from opd_env.settings import ConfigError, Settings, build, changed, configure, number, to_dict
from opd_env.settings.fields import field_types, fingerprint, outline


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Inner(Settings):
    path = "inner"
    share: float = number(0.5, low=0, high=1)
    """A share."""
    colour: Colour = Colour.RED
    """A colour."""


@dataclass(frozen=True, kw_only=True)
class Whole(Settings):
    """Everything."""

    name: str
    """A name."""
    count: int = number(1, low=1)
    """A count."""
    names: tuple[str, ...] | None = None
    """Names."""
    free: Mapping[str, Any] = field(default_factory=dict)
    """Anything."""
    inner: Inner = field(default_factory=Inner)
    """A group."""
    maybe: Inner | None = None
    """A group that may be left out."""


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"count": True}, "count is True; expected a whole number"),
        ({"count": 1.0}, "count is 1.0; expected a whole number"),
        ({"count": 0}, "count=0 is out of range: it must be at least 1"),
        ({"names": "a"}, "names is 'a'; expected a list of names or null"),
        ({"names": [1]}, "names is 1; expected text"),
        ({"name": ""}, "name is empty; set it"),
        ({"inner": {"share": 1.5}}, "inner.share=1.5 is out of range: it must be at least 0 and at most 1"),
        ({"inner": {"share": "1e-1x"}}, "inner.share is '1e-1x'; expected a number"),
        ({"inner": {"share": "1"}}, "inner.share is '1'; expected a number"),
        ({"inner": {"share": float("nan")}}, "inner.share=nan is out of range"),
        ({"inner": {"colour": "blu"}}, "inner.colour='blu' is unknown (did you mean 'blue'?); expected one of red"),
        ({"inner": {"colour": 3}}, "inner.colour is 3; expected one of red, blue"),
        ({"inner": None}, "inner is None; expected a mapping of share, colour"),
        ({"inner": {"shar": 1}}, "unknown key 'inner.shar' (did you mean 'inner.share'?)"),
        ({"share": 1}, "unknown key 'share'; write inner.share or maybe.share"),
        ({"inner_colour": "red"}, "unknown key 'inner_colour'; write inner.colour"),
        ({"name": None}, "name must be set: in a YAML file, or --name"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_with_the_value_and_what_to_write(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Whole, {"name": "x", **values})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_become_what_the_fields_declare() -> None:
    made = build(
        Whole, {"name": "x", "names": ["a", "b"], "free": {"k": [1]}, "inner": {"share": "1e-1", "colour": "blue"}}
    )
    assert made.names == ("a", "b")
    assert made.inner == Inner(share=0.1, colour=Colour.BLUE)
    assert isinstance(build(Whole, {"name": "x", "inner": {"share": 1}}).inner.share, float)


@given(
    st.builds(
        Whole,
        name=st.text(min_size=1),
        count=st.integers(1, 9),
        names=st.none() | st.lists(st.text()).map(tuple),
        free=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=3),
        inner=st.builds(Inner, share=st.floats(0, 1), colour=st.sampled_from(Colour)),
        maybe=st.none() | st.builds(Inner),
    )
)
def test_plain_values_and_back_give_the_same_settings(made: Whole) -> None:
    assert build(Whole, to_dict(made)) == made
    assert changed(made, {}) == made


def test_changed_reaches_into_groups_and_checks_again() -> None:
    made = build(Whole, {"name": "x"})
    assert changed(made, {"inner.share": 0.25, "free.deep": 1, "maybe.colour": "blue"}) == Whole(
        name="x", inner=Inner(share=0.25), free={"deep": 1}, maybe=Inner(colour=Colour.BLUE)
    )
    with pytest.raises(ConfigError, match=r"inner.share=7.0 is out of range"):
        changed(made, {"inner.share": 7})


def test_a_fingerprint_names_what_it_leaves_out_by_dotted_name() -> None:
    made = build(Whole, {"name": "x"})
    other = changed(made, {"inner.share": 0.25})
    assert fingerprint(made) != fingerprint(other)
    assert fingerprint(made, without=["inner.share"]) == fingerprint(other, without=["inner.share"])


@pytest.mark.parametrize("settings", [EvalSettings, RolloutSettings])
def test_eval_and_rollout_take_the_fields_of_training_flat(settings: type[Any]) -> None:
    from opd_env.trainer import OPDConfig

    shared = {"dtype", "chat_format", "repair_calls", "limits", "engine", "vllm_options", "concurrent_episodes"}
    student, sampling = (field_types(field_types(OPDConfig)[group]) for group in ("student", "sampling"))
    flat = field_types(settings)
    assert shared <= set(flat)
    assert all(flat[name] == (student | sampling)[name] for name in shared)
    words = ["--model", "m", "--task", "t"]
    assert configure(settings, [*words, "--limits.max_turns", "3"], prog="x").limits.max_turns == 3
    for option, place in (("--sampling.temperature", "--temperature"), ("--student.model", "--model")):
        with pytest.raises(ConfigError, match=rf"unknown option {option}; write {place}$"):
            configure(settings, [*words, option, "1"], prog="x")
    assert set(settings.common) <= set(outline(settings))
