"""A function that is no complete tool is refused where it stands; tools are found by name."""

from __future__ import annotations

import warnings
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from opd_env.tools import Tool, Toolbox, catalogue, get_tool, list_tools, register_tool, tool

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.fixture(autouse=True)
def _own_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_registered", {})


def no_docstring(n: int) -> int:
    return n


def no_argument_description(n: int) -> int:
    """Doubles."""
    return n


def no_hint(n):  # type: ignore[no-untyped-def]
    """Doubles.

    Args:
        n: a number.
    """


def star_args(*n: int) -> None:
    """Doubles.

    Args:
        n: a number.
    """


def star_kwargs(**n: int) -> None:
    """Doubles.

    Args:
        n: a number.
    """


def positional(n: int, /) -> None:
    """Doubles.

    Args:
        n: a number.
    """


def mutable_default(n: list[int] = []) -> None:  # noqa: B006
    """Doubles.

    Args:
        n: a number.
    """


def wrong_default(n: int = None) -> None:  # type: ignore[assignment]  # noqa: RUF013
    """Doubles.

    Args:
        n: a number.
    """


def infinite_default(n: float = float("nan")) -> None:
    """Doubles.

    Args:
        n: a number.
    """


def misspelled(number: int) -> None:
    """Doubles.

    Args:
        numbr: a number.
    """


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (no_docstring, "must start with a description"),
        (no_argument_description, "parameter 'n' needs a description"),
        (no_hint, "parameter 'n' needs a type hint"),
        (star_args, r"parameter 'n' is \*args"),
        (star_kwargs, r"parameter 'n' is \*args"),
        (positional, "parameter 'n' is positional-only"),
        (mutable_default, "which all calls would share"),
        (wrong_default, "has the default None, which does not fit"),
        (infinite_default, "has the default nan, which does not fit"),
        (misspelled, r"describes 'numbr', which is no parameter \(did you mean 'number'\?\)"),
    ],
)
def test_an_incomplete_function_is_refused_with_file_line_and_reason(function: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        tool(function)
    assert f"test_tool_registration.py:{function.__code__.co_firstlineno}: tool '{function.__name__}'" in str(
        caught.value
    )


def test_all_that_is_wrong_is_listed_at_once() -> None:
    def wrong(a, *b: int, c: bytes):  # type: ignore[no-untyped-def]
        pass

    with pytest.raises(ValueError, match="description") as caught:
        tool(wrong)
    for name in ("'a' needs a type hint", "'b' is *args", "'c' has the hint bytes"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "two words"),
        ("name", "a" * 65),
        ("name", "größe"),
        ("description", " "),
        ("timeout_s", 0),
        ("timeout_s", float("inf")),
        ("timeout_s", None),
        ("max_output_chars", 5),
        ("state", "dict"),
        ("isolation", "moon"),
        ("function", 3),
        ("parameters", {"type": "array"}),
        ("parameters", {"type": "object", "properties": {"n": {"type": "int"}}}),
        ("parameters", {"type": "object", "properties": {"n": {"$ref": "#/$defs/none"}}}),
        ("parameters", {"type": "object", "properties": {"n": {"$ref": "https://example.org/schema"}}}),
        ("parameters", None),
    ],
)
def test_a_field_that_is_no_use_is_refused(field: str, value: Any) -> None:
    fields: dict[str, Any] = {"name": "f", "description": "F.", "parameters": SCHEMA, "function": no_docstring}
    with pytest.raises(ValueError, match="tool "):
        Tool(**{**fields, field: value})


def test_a_tool_takes_a_schema_from_elsewhere_and_closes_it() -> None:
    double = Tool(name="math.double", description="Doubles.", parameters=SCHEMA, function=lambda n: n * 2)
    assert double.schema == {
        "type": "function",
        "function": {
            "name": "math.double",
            "description": "Doubles.",
            "parameters": {**SCHEMA, "additionalProperties": False},
        },
    }
    assert Toolbox([double]).call("math.double", {"n": 4}).content == "8"
    assert "unknown argument 'm'" in Toolbox([double]).call("math.double", {"n": 4, "m": 1}).content
    assert "additionalProperties" not in SCHEMA, "the caller's schema is left alone"


@pytest.mark.parametrize("thing", ["add", 3, dict, object()])
def test_only_functions_are_decorated(thing: Any) -> None:
    with pytest.raises(ValueError, match="@tool decorates a function, got "):
        tool(thing)


def test_methods_are_decorated_without_their_self() -> None:
    class Shop:
        def price(self, item: str) -> int:
            """Tells a price.

            Args:
                item: what.
            """
            return len(item)

    assert Toolbox([tool(Shop().price)]).call("price", {"item": "egg"}).content == "3"


def test_a_hint_that_cannot_be_found_is_explained() -> None:
    def find(place: NoSuchType) -> None:  # type: ignore[name-defined]  # noqa: F821
        """Finds."""

    with pytest.raises(ValueError, match=r"'NoSuchType' is not defined.*define that type at module level"):
        tool(find)


def test_a_decorated_function_can_still_be_called() -> None:
    @tool(name="plus", timeout_s=1.5, max_output_chars=100, deterministic=True, mutates_state=True, ends_episode=True)
    def add(a: int, b: int = 1) -> int:
        """Adds.

        Args:
            a: first.
            b: second.
        """
        return a + b

    assert add(1, b=4) == 5
    assert (add.name, add.timeout_s, add.max_output_chars) == ("plus", 1.5, 100)
    assert add.deterministic
    assert add.mutates_state
    assert add.ends_episode


def test_state_is_hidden_from_the_schema_and_must_have_a_parameter() -> None:
    @tool(state=dict)
    def remember(key: str, state: dict[str, int]) -> int:
        """Remembers.

        Args:
            key: what.
        """
        return len(state)

    assert list(remember.parameters["properties"]) == ["key"]
    with pytest.raises(ValueError, match="parameter 'state' must exist"):
        tool(state=dict)(no_docstring)


def make_double(factor: int, offset: int = 0) -> Tool:
    return Tool(name="double", description="Doubles.", parameters=SCHEMA, function=lambda n: n * factor + offset)


def test_registered_tools_and_factories_are_found_by_name() -> None:
    double = make_double(2)
    assert register_tool(double) is double
    register_tool(make_double, name="scaled")
    assert get_tool("double") is double
    assert get_tool("scaled", factor=3)(2) == 6
    assert {"double", "scaled", "calculator", "python", "search"} <= set(list_tools())
    assert list_tools() == sorted(list_tools())


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("calcluator", {}, r"did you mean 'calculator'\?\); known: calculator, "),
        ("scaled", {}, "missing a required argument: 'factor'; it is made by .* with factor, offset=0"),
        ("scaled", {"factr": 1}, "missing a required argument: 'factor'"),
        ("search", {}, "missing a required argument: 'passages'"),
        ("calculator", {"digits": 3}, "takes no options, got digits"),
        ("wrong", {}, "returned int, expected a Tool"),
    ],
)
def test_what_cannot_be_had_by_name_is_explained(name: str, options: dict[str, Any], reason: str) -> None:
    register_tool(make_double, name="scaled")
    register_tool(lambda: 3, name="wrong")  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=reason):
        get_tool(name, **options)


def test_a_name_is_taken_once() -> None:
    register_tool(make_double(2))
    with pytest.raises(ValueError, match="'double' is registered already"):
        register_tool(make_double(3))
    with pytest.raises(ValueError, match="'search' is registered already"):
        register_tool(make_double, name="search")
    with pytest.raises(ValueError, match="is named 'double', not 'triple'"):
        register_tool(make_double(3), name="triple")
    with pytest.raises(ValueError, match="decorate the function with @tool"):
        register_tool(no_docstring)


def entry_points(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    found = [EntryPoint(name, value, catalogue.ENTRY_POINT_GROUP) for name, value in points]
    monkeypatch.setattr(catalogue, "entry_points", lambda group: found if group == catalogue.ENTRY_POINT_GROUP else [])


def test_other_packages_offer_tools_and_a_broken_one_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(
        monkeypatch,
        ("theirs", "opd_env.tools.builtin.calculator:calculator"),
        ("theirs_made", "opd_env.tools.builtin.search:make_search_tool"),
        ("broken", "no_such_module_anywhere:thing"),
    )
    assert {"theirs", "theirs_made", "broken"} <= set(list_tools()), "listing imports nothing"
    assert get_tool("theirs").name == "calculator"
    assert get_tool("theirs_made", passages=[{"text": "a word"}]).name == "search"
    with pytest.raises(ValueError, match=r"tool 'broken' of .*no_such_module_anywhere:thing.*cannot be imported"):
        get_tool("broken")
    assert get_tool("calculator").name == "calculator"


def test_an_entry_point_cannot_take_a_name_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, ("calculator", "no_such_module_anywhere:evil"))
    with pytest.warns(UserWarning, match="calculator = no_such_module_anywhere:evil is left out"):
        names = list_tools()
    assert names.count("calculator") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_tool("calculator").name == "calculator"
