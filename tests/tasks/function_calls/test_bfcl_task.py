"""BFCL as a task: own tools for every problem, the first turn counts, malformed calls are not abstentions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_env.messages import ToolCall, assistant
from opd_env.tasks import require_trainable
from opd_env.tasks.function_calls.bfcl_task import BFCL, json_schema
from opd_env.tools import Toolbox
from tests.tasks.episodes import play

DATA = Path(__file__).parents[3] / ".." / "shared" / "data" / "bfcl"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the BFCL files in ../shared/data/bfcl")

FUNCTION = {
    "name": "geometry.area",
    "description": "Area of a triangle.",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "float", "description": "b"},
            "points": {"type": "array", "items": {"type": "tuple", "items": {"type": "any"}}},
            "options": {"type": "dict", "properties": {"unit": {"type": "string"}}},
        },
        "required": ["base"],
    },
}
ROW = {"id": "row_0", "question": [[{"role": "user", "content": "Area?"}]], "function": [FUNCTION]}
GOLD = {"id": "row_0", "ground_truth": [{"geometry.area": {"base": [10]}}]}


def write(folder, category, rows, answers):
    (folder / "possible_answer").mkdir(exist_ok=True)
    for place, lines in ((folder, rows), (folder / "possible_answer", answers)):
        (place / f"BFCL_v4_{category}.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "simple_python", [ROW], [GOLD])
    write(tmp_path, "irrelevance", [ROW], [])
    return tmp_path


def call(**arguments):
    return assistant("", [ToolCall("geometry.area", arguments)])


def verdict(task, *turns):
    grade = task.grade(task[0], None, turns)
    done = [name for name, value in grade.scores.items() if value and name != "needs_tool"]
    return grade.correct, *done


def test_the_first_turn_counts(folder):
    task = BFCL(path=folder)
    assert verdict(task, call(base=10)) == (True, "called")
    assert verdict(task, call(base=11), call(base=10)) == (False, "called")
    assert verdict(task, assistant("10 times")) == (False, "abstained")
    assert verdict(task, assistant("<tool_call>{"), call(base=10)) == (False, "malformed")
    assert verdict(task) == (False, "abstained")
    assert task.grade(task[0], None, [call(base=11)]).reason == (
        "geometry.area: argument 'base': 11.0 is not among the accepted [10]"
    )


def test_a_malformed_call_is_no_abstention(folder):
    task = BFCL(category="irrelevance", path=folder)
    assert verdict(task, assistant("None of the functions helps.")) == (True, "abstained")
    assert verdict(task, call(base=10)) == (False, "called")
    assert verdict(task, assistant("<tool_call>{"), assistant("None helps.")) == (False, "malformed")


def test_types_are_those_of_json_schema_at_every_depth():
    schema = json_schema(FUNCTION["parameters"])
    assert schema["type"] == "object"
    assert schema["properties"]["base"] == {"type": "number", "description": "b"}
    assert schema["properties"]["points"]["items"] == {"type": "array", "items": {"type": "string"}}
    assert schema["properties"]["options"]["type"] == "object"
    assert FUNCTION["parameters"]["type"] == "dict"


def test_episodes_of_the_environment_are_graded(folder):
    task = BFCL(path=folder)
    right = '<tool_call>\n{"name": "geometry.area", "arguments": {"base": 10}}\n</tool_call>'
    assert play(task, right).correct
    scores = play(task, right.replace("10", "11")).scores
    assert (scores["called"], scores["needs_tool"]) == (1.0, 1.0)
    irrelevance = BFCL(category="irrelevance", path=folder)
    assert play(irrelevance, "None helps.").correct
    grade = play(irrelevance, '<tool_call>\n{"name": "geometry.area", "arg', "None helps.")
    assert (grade.correct, grade.scores["malformed"], grade.scores["needs_tool"]) == (False, 1.0, 0.0)


def test_it_is_for_evaluation_only(folder):
    with pytest.raises(ValueError, match="nothing of this task may be trained on"):
        require_trainable(BFCL(path=folder))
    with pytest.raises(ValueError, match="is named 'train'; known: test"):
        BFCL("train", path=folder)


def test_mistakes_are_named(folder):
    with pytest.raises(ValueError, match=r"no category is named 'simple_pyton' \(did you mean 'simple_python'"):
        BFCL(category="simple_pyton", path=folder)
    with pytest.raises(FileNotFoundError, match=r"no file .*BFCL_v4_parallel\.json"):
        BFCL(category="parallel", path=folder)
    write(folder, "multiple", [ROW], [{**GOLD, "id": "row_1"}])
    with pytest.raises(ValueError, match="has no answer to row_0"):
        BFCL(category="multiple", path=folder)
    write(folder, "multiple", [{**ROW, "question": [[], []]}], [GOLD])
    with pytest.raises(ValueError, match="line 1: 2 turns in 'question', expected one"):
        BFCL(category="multiple", path=folder)


def test_without_a_folder_and_without_the_package_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr("opd_env.tasks.function_calls.bfcl_backends.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="give path=, or install"):
        BFCL()


@needs_data
@pytest.mark.parametrize(
    ("category", "size"),
    [("simple_python", 400), ("multiple", 200), ("parallel", 200), ("parallel_multiple", 200), ("irrelevance", 240)],
)
def test_every_published_problem_has_tools_that_a_student_can_call(category, size):
    task = BFCL(category=category, path=DATA)
    assert len(task) == len({example.id for example in task}) == size
    for example in task:
        with Toolbox(task.tools_of(example)) as toolbox:
            for function in example.metadata["functions"]:
                assert toolbox.call(function["name"], {"any": ["thing"], "class": None}).ok
                assert not toolbox.call(function["name"], [1]).ok
            assert [schema["function"]["name"] for schema in toolbox.schemas] == [
                function["name"] for function in example.metadata["functions"]
            ]
        json.dumps(example.metadata)
