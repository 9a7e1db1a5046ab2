"""The paper's tool-use test: both presentations, the exact rule, and the original's rule written a second time."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.messages import ToolCall, assistant
from opd_env.tasks import load_task, require_trainable
from opd_env.tasks.function_calls.tooluse68 import (
    ToolUse68,
    functions_of,
    match_calls,
    original_verdict,
    question_of,
    read_actions,
    read_gold,
    written,
)
from tests.tasks.episodes import play

DATA = Path(__file__).parents[3] / ".." / "shared" / "data" / "tooluse68"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the file in ../shared/data/tooluse68")

PROMPT = """Your task is to answer the user's question using available tools.
You have access to the following tools:
Name: Lamps
Description: Lamps at home
Documentation:
setLamp: Set a lamp
Parameters: {"room": "Required. string. The room.", "colour": "Object. Its colour.", "hours": "Array[integer]. When."}
Output: Done.
 - Format: application/json
listRooms: List the rooms
Parameters: {}
Output: Done.

Use the following format:
Thought: you should always think about what to do
Action: the action to take, should be one of the tool names.
Action Input: the input to the action, must be in JSON format.

Begin!
Question: Set the lamp.\nQuestion: In the hall, please?"""


def gold_of(*calls):
    return json.dumps([{"Action": name, "Action_Input": json.dumps(arguments)} for name, arguments in calls])


def row(*calls, idx=7):
    return {"prompt": PROMPT, "answer": gold_of(*calls), "idx": idx}


def task_of(tmp_path, *calls, **options):
    (tmp_path / "test.json").write_text(json.dumps(row(*calls)) + "\n")
    return ToolUse68(path=tmp_path, **options)


def react(*calls):
    return "Thought: I know.\n" + "\n".join(f"Action: {name}\nAction Input: {json.dumps(a)}" for name, a in calls)


def verdict(grade):
    return grade.correct, *(name for name, value in grade.scores.items() if value)


def test_the_papers_prompt_is_shown_word_for_word_and_answered_in_text(tmp_path):
    call = ("setLamp", {"room": "hall"})
    task = task_of(tmp_path, call)
    assert [message["content"] for message in task[0].messages] == [PROMPT]
    assert task.tools_of(task[0]) == []
    assert verdict(play(task, react(call))) == (True, "original", "called")
    assert verdict(play(task, react(("setLamp", {"room": "attic"})))) == (False, "called")
    assert verdict(play(task, "The lamp is on.")) == (False, "abstained")
    assert verdict(play(task, "Action: setLamp\nAction Input: {'room': 1}")) == (False, "malformed")


def test_the_functions_can_be_given_as_tools_instead(tmp_path):
    task = task_of(tmp_path, ("setLamp", {"room": "hall"}), presentation="tools")
    assert task[0].messages[0]["content"] == "In the hall, please?"
    assert [tool.name for tool in task.tools_of(task[0])] == ["setLamp", "listRooms"]
    right = '<tool_call>\n{"name": "setLamp", "arguments": {"room": "hall"}}\n</tool_call>'
    assert verdict(play(task, right)) == (True, "original", "called")
    assert verdict(play(task, right.replace("hall", "attic"))) == (False, "called")
    assert verdict(play(task, "No.")) == (False, "abstained")
    assert verdict(play(task, '<tool_call>\n{"name": "setLamp", "arg', right)) == (False, "malformed")


def test_a_documented_function_becomes_a_json_schema():
    lamp, rooms = functions_of(PROMPT)
    assert (lamp["name"], lamp["description"]) == ("setLamp", "Set a lamp")
    properties = lamp["parameters"]["properties"]
    assert [one["type"] for one in properties.values()] == ["string", "object", "array"]
    assert properties["hours"] == {
        "type": "array",
        "items": {"type": "integer"},
        "description": "Array[integer]. When.",
    }
    assert lamp["parameters"]["required"] == ["room"]
    assert rooms["parameters"] == {"type": "object", "properties": {}, "required": []}


def test_nested_json_and_several_calls_are_read_where_the_original_fails(tmp_path):
    calls = [("setLamp", {"room": "hall", "colour": {"red": 1, "of": [{"deep": "}"}]}}), ("listRooms", {})]
    task = task_of(tmp_path, *calls)
    assert verdict(play(task, react(*calls))) == (True, "called")
    assert verdict(play(task, react(*reversed(calls)))) == (True, "called")
    assert verdict(play(task, react(calls[0]))) == (False, "called")


def test_the_original_passes_what_it_merges():
    gold = [("setLamp", {"room": "hall", "on": True}), ("setLamp", {"room": "attic", "on": True})]
    wrong = [("setLamp", {"room": "attic"}), ("setLamp", {"on": 1})]
    assert original_verdict(react(*wrong), gold_of(*gold))
    assert match_calls(read_actions(react(*wrong)), read_gold(gold_of(*gold)))


def test_an_optional_call_may_be_made_once_or_not_at_all():
    gold = read_gold(gold_of(("a", {"x": 1}), ("[Optional]b", {})))
    a, b = ToolCall("a", {"x": 1}), ToolCall("b", {})
    assert match_calls([a], gold) == match_calls([b, a], gold) == ""
    assert match_calls([b], gold) == 'missing a({"x": 1})'
    assert match_calls([a, b, b], gold) == "too much: b({})"


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ({"n": 1}, {"n": 1.0}, True),
        ({"n": 1}, {"n": True}, False),
        ({"n": 0}, {"n": False}, False),
        ({"n": 1}, {"n": "1"}, False),
        ({"n": None}, {}, False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"l": [1, 2]}, {"l": [2, 1]}, False),
        ({"l": [{"n": 2.0}]}, {"l": [{"n": 2}]}, True),
        ({"s": "Hall"}, {"s": "hall"}, False),
    ],
)
def test_arguments_are_equal_as_json_values(first, second, equal):
    assert (match_calls([ToolCall("f", first)], read_gold(gold_of(("f", second)))) == "") is equal


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Action: f", "action 'f' has no Action Input"),
        ("Action: f\nAction: g\nAction Input: {}", "action 'f' has no Action Input"),
        ("Action Input: {}", "an Action Input without an Action before it"),
        ("Action: f\nAction Input: {}\nAction Input: {}", "an Action Input without an Action before it"),
        ("Action:   \nAction Input: {}", "an Action without a name"),
        ("Action: f\nAction Input: [1]", "the input of action 'f' is a list, expected a JSON object"),
        ("Action: f\nAction Input:", "the input of action 'f' is not JSON: Expecting value"),
        ('Action: f\nAction Input: {"a": NaN}', "the input of action 'f' is not JSON: NaN is no JSON value"),
        ('Action: f\nAction Input: {"a": ' + "9" * 5000 + "}", "the input of action 'f' is not JSON: Exceeds"),
        ('Action: f\nAction Input: {"a": ' + "[" * 100_000, "the input of action 'f' is not JSON: it is nested too"),
        ("Action: f\nAction Input: ```json\n{}\n```", "the input of action 'f' is not JSON: Expecting value"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_malformed_with_the_reason(text, reason):
    with pytest.raises(ValueError, match="^" + re.escape(reason)):
        read_actions(text)


def test_text_around_the_calls_is_passed_over():
    text = 'My Action: no.\n  Action: f g \r\nThought: hm\nAction Input:\n\n {"a": 1} and so on\nObservation: {}'
    assert read_actions(text) == (ToolCall("f g", {"a": 1}),)
    assert read_actions("") == ()


def test_markers_inside_a_json_string_are_text():
    (call,) = read_actions('Action: f\nAction Input: {"q": "\\nAction: g\\nAction Input: {}"}')
    assert call == ToolCall("f", {"q": "\nAction: g\nAction Input: {}"})


@pytest.mark.parametrize("text", ["Action: f\nAction Input: {" * 100_000, "Action:" + " " * 500_000, "\n \t" * 300_000])
def test_hostile_lengths_are_read_in_linear_time(text):
    with contextlib.suppress(ValueError):
        assert read_actions(text) == ()
    assert not original_verdict(text, gold_of(("f", {"a": 1})))


names = st.text("abcXYZ_09[]. ", min_size=1).map(str.strip).filter(bool)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(-1e300, 1e300) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
calls_written = st.lists(
    st.builds(ToolCall, names, st.dictionaries(st.text(max_size=8), values, max_size=3)), max_size=4
)


@given(calls_written, st.randoms())
def test_what_is_written_is_read_back_and_matches_in_any_order(calls, random):
    assert read_actions(written(calls)) == tuple(calls)
    gold = read_gold(gold_of(*((call.name.replace("[", "("), call.arguments) for call in calls)))
    made = [ToolCall(call.name.replace("[", "("), call.arguments) for call in calls]
    random.shuffle(made)
    assert match_calls(made, gold) == ""
    assert match_calls([*made, ToolCall("another one", {})], gold).startswith("too much: another one")
    if made:
        assert match_calls(made[1:], gold).startswith("missing")


fragments = st.sampled_from(
    ["Action:", "Action Input:", " ", "\n", "f", "f-g", "{", "}", '{"a": 1}', '{"a": {"b": 2}}', '"', "{}", "x", "NaN",
     "[", '{"b": true}', "Thought: ", "\\", "é"]
)  # fmt: skip
texts = st.lists(fragments, max_size=25).map("".join)


@given(texts)
def test_any_text_is_read_or_refused(text):
    try:
        calls = read_actions(text)
    except ValueError:
        return
    assert read_actions(written(calls)) == calls


def original_rule(text, gold):
    """As the paper's code has it: two regular expressions, a merged dictionary, Python's equality."""
    merged, expected = {}, {}
    for block in re.findall(r"Action Input:\s*({.*?})", text, re.DOTALL):
        with contextlib.suppress(json.JSONDecodeError):
            merged.update(json.loads(block))
    for entry in json.loads(gold):
        expected.update(json.loads(entry["Action_Input"]))
    names = Counter(re.findall(r"Action:\s*(\w+)", text))
    return names == Counter(entry["Action"] for entry in json.loads(gold)) and merged == expected


@given(
    texts, st.sampled_from([gold_of(("f", {"a": 1})), gold_of(("f", {})), gold_of(("f", {"a": 1}), ("f", {"b": 1}))])
)
def test_the_originals_rule_agrees_with_its_regular_expressions(text, gold):
    for answer in (text, f"Action: f\nAction Input: {text}", f'Action: f\nAction Input: {{"a": 1}}{text}'):
        assert original_verdict(answer, gold) == original_rule(answer, gold)


def test_it_is_for_evaluation_only(tmp_path):
    task = task_of(tmp_path, ("listRooms", {}))
    with pytest.raises(ValueError, match="nothing of this task may be trained on"):
        require_trainable(task)
    assert (task[0].id, task[0].difficulty, len(task)) == ("7", 1, 1)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"give one of them \(the paper's file is datasets/tooluse/test\.json"):
        ToolUse68()
    with pytest.raises(ValueError, match=r"no presentation is named 'reakt' \(did you mean 'react'"):
        task_of(tmp_path, presentation="reakt")
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.json"):
        ToolUse68(path=tmp_path / "absent.json")
    entries = (
        "[]",
        '"f"',
        '{"Action": "f"}',
        '{"Action": "f", "Action_Input": "[]"}',
        '{"Action": "f", "Action_Input": {}}',
    )
    for answer in ("{", *(f"[{entry}]" for entry in entries)):
        (tmp_path / "test.json").write_text(json.dumps(row() | {"answer": answer}))
        with pytest.raises(ValueError, match=r"test\.json, line 1: .*JSON object"):
            ToolUse68(path=tmp_path)
    (tmp_path / "test.json").write_text(json.dumps(row() | {"prompt": "Question: why?"}))
    with pytest.raises(ValueError, match="line 1: the prompt documents no function"):
        ToolUse68(path=tmp_path)


@needs_data
def test_every_gold_answer_is_right_and_the_original_fails_two_of_them():
    failed = []
    for presentation in ("react", "tools"):
        task = load_task("tooluse68", "test", path=DATA, presentation=presentation)
        assert len(task) == len({example.id for example in task}) == 68
        for example in task:
            calls = [one.call for one in read_gold(example.answer)]
            turn = assistant(written(calls)) if presentation == "react" else assistant("", calls)
            grade = task.grade(example, None, [turn])
            assert grade.correct, grade.reason
            failed += [] if grade.scores["original"] else [example.id]
            assert not task.grade(example, None, [assistant("I cannot.")]).correct
    assert failed == 2 * ["4072", "4079"]


@needs_data
def test_every_documented_function_is_a_valid_tool():
    prompts = {example.id: example.messages[0]["content"] for example in ToolUse68(path=DATA)}
    task = load_task("tooluse68", "test", path=DATA, presentation="tools")
    for example in task:
        tools = {tool.name: tool for tool in task.tools_of(example)}
        assert len(tools) == prompts[example.id].count("\nParameters: ")
        for tool in tools.values():
            jsonschema.Draft202012Validator.check_schema(tool.parameters)
        assert "Question:" not in example.messages[0]["content"]
        assert question_of(f"x\nQuestion: {example.messages[0]['content']}") == example.messages[0]["content"]
