"""Type hints and docstring become a JSON Schema, and JSON arguments become what the function asked for."""

from __future__ import annotations

import dataclasses
from enum import Enum, IntEnum
from typing import Annotated, Any, Literal, NotRequired, Optional, TypedDict

import pytest
from jsonschema import Draft202012Validator

from opd_env.tools import Toolbox, tool
from opd_env.tools.schema import parse_docstring, read_signature


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Point(TypedDict):
    x: float
    label: NotRequired[Annotated[str, "a name"]]


@dataclasses.dataclass
class Box:
    width: int
    colour: Colour = Colour.RED
    tags: list[str] = dataclasses.field(default_factory=list)


class Tree(TypedDict):
    children: list[Tree]


def property_of(hint: Any, **default: Any) -> dict[str, Any]:
    """The schema of a parameter with this hint, without its description."""

    def function(value):  # type: ignore[no-untyped-def]
        """Describes.

        Args:
            value: a value.
        """

    function.__annotations__["value"] = hint
    if default:
        function.__defaults__ = (default["default"],)
    schema = read_signature(function).parameters
    Draft202012Validator.check_schema(schema)
    found = dict(schema["properties"]["value"])
    assert found.pop("description") == "a value."
    return found


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (list, {"type": "array"}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (list[list[str]], {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}),
        (dict, {"type": "object"}),
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Literal["a", 1, None], {"enum": ["a", 1, None]}),
        (Colour, {"type": "string", "enum": ["red", "blue"]}),
        (Level, {"type": "integer", "enum": [1, 2]}),
        (int | str, {"type": ["integer", "string"]}),
        (Optional[str], {"type": ["string", "null"]}),  # noqa: UP045
        (list[int] | None, {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]}),
        (
            Point,
            {
                "type": "object",
                "properties": {"x": {"type": "number"}, "label": {"type": "string", "description": "a name"}},
                "required": ["x"],
                "additionalProperties": False,
            },
        ),
        (
            Box,
            {
                "type": "object",
                "properties": {
                    "width": {"type": "integer"},
                    "colour": {"type": "string", "enum": ["red", "blue"]},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["width"],
                "additionalProperties": False,
            },
        ),
    ],
)
def test_each_hint_has_its_schema(hint: Any, schema: dict[str, Any]) -> None:
    assert property_of(hint) == schema


@pytest.mark.parametrize(
    ("hint", "default", "written"),
    [(int, 3, 3), (str, "", ""), (Colour, Colour.BLUE, "blue"), (int | None, None, None), (float, 1, 1)],
)
def test_a_default_is_written_into_the_schema_and_makes_the_argument_optional(
    hint: Any, default: Any, written: Any
) -> None:
    assert property_of(hint, default=default)["default"] == written


@pytest.mark.parametrize("hint", [Any, object, set[str], tuple[int, int], bytes, complex, dict[int, str], Tree, type])
def test_a_hint_without_a_schema_is_refused(hint: Any) -> None:
    with pytest.raises(ValueError, match="parameter 'value' has the hint"):
        property_of(hint)


def test_a_description_may_stand_in_the_annotation() -> None:
    def function(value: Annotated[int, "how many"]) -> None:
        """Counts."""

    assert read_signature(function).parameters["properties"]["value"] == {"type": "integer", "description": "how many"}


def test_the_function_gets_what_its_hints_promise() -> None:
    seen: list[Any] = []

    @tool
    def take(
        box: Box,
        whole: int,
        number: float,
        colours: list[Colour],
        levels: dict[str, Level],
        maybe: Colour | None,
        point: Point,
        choice: Literal[1, 2],
        mixed: int | str,
    ) -> None:
        """Takes.

        Args:
            box: a box.
            whole: a whole number.
            number: a number.
            colours: colours.
            levels: levels.
            maybe: a colour.
            point: a point.
            choice: a choice.
            mixed: one of two.
        """
        seen.extend([box, whole, number, colours, levels, maybe, point, choice, mixed])

    result = Toolbox([take]).call(
        "take",
        {
            "box": {"width": 2.0, "colour": "blue"},
            "whole": 3.0,
            "number": 4,
            "colours": ["red", "blue"],
            "levels": {"a": 2},
            "maybe": None,
            "point": {"x": 1},
            "choice": 2.0,
            "mixed": 5.0,
        },
    )
    assert result.content == "null"
    expected = [
        Box(2, Colour.BLUE),
        3,
        4,
        [Colour.RED, Colour.BLUE],
        {"a": Level.HIGH},
        None,
        {"x": 1},
        2,
        5,
    ]
    assert seen == expected
    assert [type(value) for value in seen] == [type(value) for value in expected]
    assert type(seen[0].width) is int


def test_a_docstring_splits_into_description_and_arguments() -> None:
    description, arguments = parse_docstring(
        """Finds a town.

        Second paragraph, which
        goes on.

        Args:
            name (str): the town's name,
                as people write it: in full.
            limit: most answers

        Returns:
            limit: this is no argument.
        """
    )
    assert description == "Finds a town.\n\nSecond paragraph, which goes on."
    assert arguments == {"name": "the town's name, as people write it: in full.", "limit": "most answers"}


def test_a_docstring_without_arguments_is_all_description() -> None:
    assert parse_docstring("Says hello: to all.") == ("Says hello: to all.", {})
    assert parse_docstring("") == ("", {})


def test_an_odd_line_of_a_docstring_refuses_no_tool() -> None:
    odd = "Adds.\n\nArgs:\n    two numbers\n    *a: the first\n\nNote:\n    b: is none\n\nRaises:\n    when it cannot"
    assert parse_docstring(odd) == ("Adds.", {"a": "the first"})
