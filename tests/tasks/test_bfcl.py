"""BFCL rules: each rule of the official checker, order-free matching, any arguments, the published gold answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.messages import ToolCall
from opd_env.tasks.bfcl import CATEGORIES, match_calls

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "bfcl"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the BFCL files in ../shared/data/bfcl")

PROPERTIES = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "size": {"type": "float"},
    "flag": {"type": "boolean"},
    "names": {"type": "array", "items": {"type": "string"}},
    "point": {"type": "tuple", "items": {"type": "float"}},
    "options": {"type": "dict"},
    "people": {"type": "array", "items": {"type": "dict"}},
    "anything": {"type": "any"},
}


def judge(argument, value, accepted):
    """The verdict on one call with one argument."""
    function = {"name": "f", "parameters": {"type": "dict", "properties": PROPERTIES, "required": []}}
    return match_calls([function], [ToolCall("f", {argument: value})], [{"f": {argument: accepted}}], "simple_python")


@pytest.mark.parametrize(
    ("argument", "value", "accepted", "valid"),
    [
        # Texts: without spaces and ,./-_*^, in lower case, with double quotes.
        ("text", "April 1, 2024", ["april 1 2024"], True),
        ("text", "a_b-c.d/e*f^g", ["ABCDEFG"], True),
        ("text", "'a'", ['"a"'], True),
        ("text", "abc", ["ab"], False),
        ("text", "", ["x", ""], True),
        ("text", "a;b", ["ab"], False),
        ("text", 5, ["5"], False),
        ("text", "b", ["a", "b"], True),
        # Numbers: exact types, but an int stands for a float.
        ("count", 5, [5], True),
        ("count", 6, [5], False),
        ("count", 5.0, [5], False),
        ("count", "5", [5], False),
        ("count", True, [1], False),
        ("size", 5, [5.0], True),
        ("size", 5.0, [5], True),
        ("size", 5.1, [5.0], False),
        ("size", True, [1.0], False),
        ("size", "5.0", [5.0], False),
        ("size", 10**400, [5.0], False),
        ("flag", True, [True], True),
        ("flag", 1, [True], False),
        ("flag", False, [True], False),
        ("count", None, [5], False),
        # A value of the first gold value's type is compared as it is (a variable's name, say).
        ("count", "n", ["n"], True),
        ("count", "N", ["n"], False),
        ("anything", 5, [5], True),
        ("anything", 5, ["5"], False),
        ("anything", "A b", ["ab"], True),
        # Lists: in order, item by item.
        ("names", ["New York", "b"], [["new york", "B"]], True),
        ("names", ["b", "a"], [["a", "b"]], False),
        ("names", ["a"], [["a", "b"]], False),
        ("names", [1], [["a"]], False),
        ("names", [1], [[1]], True),
        ("names", "a", [["a"]], False),
        ("names", [], [["a"], ""], True),
        ("names", [], [["a"]], False),
        ("point", [1.0, 2.5], [[1.0, 2.5]], True),
        ("point", [1, 2], [[1.0, 2.5]], False),
        ("point", [1, 2], [[1, 2]], True),
        # Objects: accepted values for each key; "" marks a key that may be left out.
        ("options", {"a": "X y", "b": 2}, [{"a": ["xy"], "b": [1, 2]}], True),
        ("options", {"a": "z"}, [{"a": ["xy"]}], False),
        ("options", {"a": "xy"}, [{"a": ["xy"], "b": [1]}], False),
        ("options", {"a": "xy"}, [{"a": ["xy"], "b": [1, ""]}], True),
        ("options", {"a": "xy", "c": 1}, [{"a": ["xy"]}], False),
        ("options", {"a": "q"}, [{"a": ["xy"]}, {"a": ["q"]}], True),
        ("options", {}, ["", {"a": [""]}], True),
        ("options", "a", [{"a": ["xy"]}], False),
        ("people", [{"a": 1}, {"a": 2}], [[{"a": [1]}, {"a": [2]}]], True),
        ("people", [{"a": 2}, {"a": 1}], [[{"a": [1]}, {"a": [2]}]], False),
        ("people", [{"a": 1}], [[{"a": [1]}, {"a": [2]}]], False),
        ("people", [1], [[{"a": [1]}]], False),
    ],
)
def test_values(argument, value, accepted, valid):
    verdict = judge(argument, value, accepted)
    assert verdict.valid == valid
    assert bool(verdict.errors) != valid


AREA = {
    "name": "geometry.area",
    "parameters": {
        "type": "dict",
        "properties": {"base": {"type": "integer"}, "height": {"type": "integer"}, "unit": {"type": "string"}},
        "required": ["base", "height"],
    },
}
OTHER = {"name": "other", "parameters": {"type": "dict", "properties": {"x": {"type": "integer"}}, "required": []}}
GOLD = [{"geometry.area": {"base": [10], "height": [5], "unit": ["cm", ""]}}]
RIGHT = {"base": 10, "height": 5}


def area(**arguments):
    return ToolCall("geometry.area", arguments)


@pytest.mark.parametrize(
    ("calls", "errors"),
    [
        ([area(**RIGHT)], ()),
        ([area(**RIGHT, unit="CM")], ()),
        ([], ("0 calls, expected 1",)),
        ([area(**RIGHT), area(**RIGHT)], ("2 calls, expected 1",)),
        ([ToolCall("area", RIGHT)], ("'area' called, expected 'geometry.area'",)),
        ([area(base=10)], ("geometry.area: argument 'height' is missing",)),
        ([area(**RIGHT, color="red")], ("geometry.area: argument 'color' is not expected",)),
        (
            [area(base="10", unit="m")],
            (
                "geometry.area: argument 'height' is missing",
                "geometry.area: argument 'base': '10' is a str, expected int",
                "geometry.area: argument 'unit': 'm' is not among the accepted ['cm', '']",
            ),
        ),
    ],
)
@pytest.mark.parametrize("category", ["simple_python", "multiple", "live_multiple", "parallel"])
def test_one_call_is_judged_with_all_its_errors(category, calls, errors):
    assert match_calls([AREA, OTHER], calls, GOLD, category) == (not errors, errors)


def test_an_optional_argument_must_be_there_unless_the_gold_answer_lets_it_be_left_out():
    gold = [{"geometry.area": {"base": [10], "height": [5], "unit": ["cm"]}}]
    assert match_calls([AREA], [area(**RIGHT)], gold, "simple_python").errors == (
        "geometry.area: argument 'unit' is missing",
    )


def test_an_argument_of_the_schema_that_the_gold_answer_lacks_is_not_expected():
    gold = [{"geometry.area": {"base": [10], "height": [5]}}]
    assert not match_calls([AREA], [area(**RIGHT, unit="cm")], gold, "simple_python").valid


def test_an_argument_that_is_required_stays_so_whatever_the_gold_answer_says():
    gold = [{"geometry.area": {"base": [10], "height": [5, ""]}}]
    assert not match_calls([AREA], [area(base=10)], gold, "simple_python").valid


def x(value):
    return ToolCall("other", {} if value is None else {"x": value})


def test_parallel_calls_may_come_in_any_order():
    gold = [{"other": {"x": [1]}}, {"geometry.area": {"base": [10], "height": [5]}}, {"other": {"x": [2]}}]
    calls = [x(2), area(**RIGHT), x(1)]
    assert match_calls([AREA, OTHER], calls, gold, "parallel_multiple").valid
    assert match_calls([AREA, OTHER], [*calls[:2], x(3)], gold, "parallel_multiple").errors == (
        "other: argument 'x': 3 is not among the accepted [1]",
    )


def test_parallel_calls_are_matched_as_a_whole_and_not_greedily():
    """Taken in order, the first call would use up the gold answer that only the second call fits."""
    gold = [{"other": {"x": [1, 2]}}, {"other": {"x": [1]}}, {"other": {"x": [3, 2]}}]
    assert match_calls([OTHER], [x(1), x(2), x(3)], gold, "parallel").valid
    assert match_calls([OTHER], [x(3), x(1), x(2)], gold, "parallel").valid


def test_one_call_cannot_answer_two_expected_ones():
    gold = [{"other": {"x": [1]}}, {"other": {"x": [1, 2]}}]
    verdict = match_calls([OTHER], [x(1), x(3)], gold, "parallel")
    assert not verdict.valid
    assert len(verdict.errors) == 1


def test_a_call_made_twice_leaves_an_expected_one_open():
    verdict = match_calls([OTHER], [x(1), x(1)], [{"other": {"x": [1]}}, {"other": {"x": [2]}}], "parallel")
    assert verdict == (False, ("other: argument 'x': 1 is not among the accepted [2]",))


@pytest.mark.parametrize("category", ["irrelevance", "live_irrelevance"])
def test_irrelevance_expects_no_call(category):
    assert match_calls([OTHER], [], [], category).valid
    assert match_calls([OTHER], [x(1)], [], category).errors == ("1 call, expected none",)


def test_relevance_expects_any_call():
    assert match_calls([OTHER], [x(1)], [], "live_relevance").valid
    assert not match_calls([OTHER], [], [], "live_relevance").valid


@pytest.mark.parametrize(
    "call", [x(1), {"name": "other", "arguments": {"x": 1}}, {"other": {"x": 1}}], ids=["ToolCall", "json", "official"]
)
def test_calls_may_be_given_in_three_notations(call):
    assert match_calls([OTHER], [call], [{"other": {"x": [1]}}], "simple").valid


def test_an_unknown_category_is_refused():
    with pytest.raises(ValueError, match=r"no category is named 'paralel' \(did you mean 'parallel'"):
        match_calls([OTHER], [], [], "paralel")
    with pytest.raises(ValueError, match="no category is named 'simple_java'"):
        match_calls([OTHER], [], [], "simple_java")


def test_gold_that_does_not_fit_the_functions_is_a_fault_of_the_data():
    with pytest.raises(ValueError, match=r"no function of this row is named 'othr' \(did you mean 'other'"):
        match_calls([AREA, OTHER], [x(1)], [{"othr": {"x": [1]}}], "multiple")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.sampled_from("ab"), children, max_size=2),
    max_leaves=6,
)
ACCEPTED = {
    "text": ["a", ""],
    "count": [5],
    "size": [5.0, ""],
    "flag": [True],
    "names": [["a", "b"], ""],
    "point": [[1.0, 2.0]],
    "options": [{"a": ["x"], "b": [1, ""]}, ""],
    "people": [[{"a": [1]}], ""],
    "anything": ["a"],
}


@given(st.sampled_from(sorted(PROPERTIES)), JSON)
def test_any_arguments_get_a_verdict(argument, value):
    verdict = judge(argument, value, ACCEPTED[argument])
    assert verdict.valid == (not verdict.errors)


@given(st.permutations(range(5)), st.data())
def test_right_parallel_calls_are_right_in_any_order(order, data):
    accepted = [data.draw(st.sets(st.integers(0, 4), min_size=1)) | {number} for number in range(5)]
    gold = [{"other": {"x": sorted(values)}} for values in accepted]
    assert match_calls([OTHER], [x(number) for number in order], gold, "parallel").valid


def test_an_error_about_a_huge_value_stays_short():
    verdict = judge("text", "x" * 10**6, ["a"])
    assert len(verdict.errors[0]) < 300


def first_accepted(value):
    """The call that the first accepted values make."""
    if isinstance(value, dict):
        choices = {key: next((c for c in options if c != ""), None) for key, options in value.items()}
        return {key: first_accepted(choice) for key, choice in choices.items() if choice is not None}
    return [first_accepted(item) for item in value] if isinstance(value, list) else value


def published(category):
    rows = [json.loads(line) for line in (DATA / f"BFCL_v4_{category}.json").open()]
    answers = [json.loads(line) for line in (DATA / "possible_answer" / f"BFCL_v4_{category}.json").open()]
    return list(zip(rows, answers, strict=True))


@needs_data
@pytest.mark.parametrize(
    ("category", "faulty"),
    [
        ("simple_python", []),
        ("multiple", []),
        ("parallel", []),
        # The official checker rejects these two as well: they accept an argument that the schema lacks.
        ("parallel_multiple", ["parallel_multiple_12", "parallel_multiple_26"]),
    ],
)
def test_the_published_gold_answers_are_right(category, faulty):
    rejected = []
    for row, answer in published(category):
        assert row["id"] == answer["id"]
        gold = answer["ground_truth"]
        calls = [{name: first_accepted(arguments)} for call in gold for name, arguments in call.items()]
        assert len(calls) >= len(gold)
        for order in (calls, calls[::-1]):
            if not match_calls(row["function"], order, gold, category).valid and row["id"] not in rejected:
                rejected.append(row["id"])
    assert rejected == faulty


def test_the_categories_are_those_of_python_and_single_turn():
    assert {"simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance"} <= CATEGORIES
