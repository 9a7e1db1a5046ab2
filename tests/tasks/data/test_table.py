"""Tables as tasks: ten lines are enough, and a mistake is named by file, key and fix."""

from __future__ import annotations

import json

import pytest

from opd_env.episode.env import ToolEnv
from opd_env.tasks import list_tasks, load_task, register_task, registry, require_trainable
from opd_env.tasks.data.table import table_task

ROWS = [{"q": f"What is {n} + {n}?", "a": 2 * n, "kind": "even" if n % 2 == 0 else "odd", "n": n} for n in range(40)]
PLAIN = 'dataset: rows.jsonl\nquestion: "{q} Think."\nanswer: a\ngrader: number\nsplits: {test: test}\n'


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return tmp_path


def table(folder, text, name="mine.yaml"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_five_lines_make_a_task_that_is_played_and_graded(folder):
    task = load_task(table(folder, PLAIN + "tools: [calculator]\ncategory: kind\ndifficulty: n\n"), "test")
    assert (task.name, len(task), task.tools) == ("mine", 40, ("calculator",))
    example = task[3]
    assert example.messages[-1]["content"] == "What is 3 + 3? Think."
    assert (example.id, example.answer, example.difficulty) == ("test-3", "6", 3)
    assert example.metadata["category"] == "odd"
    env = ToolEnv(task)
    env.reset(options={"index": 3})
    *_, info = env.step("It is 6.")
    assert info["grade"].correct
    with pytest.raises(ValueError, match="for evaluation only"):
        require_trainable(task)


def test_a_filter_keeps_rows_and_their_numbers(folder):
    task = load_task(table(folder, PLAIN + "filter: {kind: odd, n: [3, 5, 6]}\n"), "test")
    assert [example.id for example in task] == ["test-3", "test-5"]


def test_splits_that_share_a_source_share_no_row_and_lose_none(folder):
    text = PLAIN.replace("{test: test}", "{train: all, validation: all, test: all}")
    splits = {split: load_task(table(folder, text), split) for split in ("train", "validation", "test")}
    ids = [example.id for task in splits.values() for example in task]
    assert sorted(ids) == sorted(f"all-{n}" for n in range(40))
    assert [task.train_allowed for task in splits.values()] == [True, False, False]


@pytest.mark.parametrize("by_path", [False, True])
def test_the_splits_of_one_file_share_no_row_whatever_they_are_called(folder, by_path):
    text = PLAIN.replace("splits: {test: test}\n", "").replace("rows.jsonl", "some/set" if by_path else "rows.jsonl")
    options = {"path": folder / "rows.jsonl"} if by_path else {}
    train, test = (
        {example.messages[-1]["content"] for example in load_task(table(folder, text), split, **options)}
        for split in ("train", "test")
    )
    assert not train & test
    assert (len(train | test), bool(test)) == (40, True)


def test_another_file_can_stand_in_for_the_hub(folder):
    (folder / "test.jsonl").write_text(
        '{"Body": "Ann has 3 pens.", "Question": "How many?", "Answer": 3.0, "Type": "X"}\n'
    )
    task = load_task("svamp", "test", path=folder)
    assert task[0].messages[0]["content"] == "Ann has 3 pens. How many?"
    assert task.grade(task[0], "3").correct
    assert not task.grade(task[0], "4").correct
    assert (task.licence, task[0].metadata["category"]) == ("MIT", "X")


def test_texts_have_any_of_several_answers(folder):
    (folder / "rows.jsonl").write_text('{"q": "Who?", "a": ["The Beatles", "Fab Four"]}\n')
    task = load_task(table(folder, PLAIN.replace("number", "text")), "test")
    assert task.grade(task[0], "They sang.\nAnswer: fab four!").correct
    assert task.grade(task[0], "Answer: a Beatles song").scores == {"exact": 0.0, "f1": pytest.approx(2 / 3)}


def test_a_tool_may_have_options_and_find_its_file_beside_the_yaml(folder):
    (folder / "passages.jsonl").write_text('{"text": "Kabul is the capital of Afghanistan."}\n')
    text = PLAIN + "tools: [calculator, {search: {passages: passages.jsonl, k: 1}}]\n"
    task = load_task(table(folder, text), "test")
    assert task.tools[0] == "calculator"
    assert "Kabul" in task.tools[1](query="capital of Afghanistan")


def test_the_version_follows_every_change_of_the_file(folder):
    first = table_task(table(folder, PLAIN, "one.yaml")).version
    second = table_task(table(folder, PLAIN.replace("Think.", "Think!"), "two.yaml")).version
    assert first != second
    assert first == table_task(table(folder, PLAIN, "three.yaml")).version


def test_a_table_can_be_registered_under_a_name(folder, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    register_task("sums")(table_task(table(folder, PLAIN)))
    assert "sums" in list_tasks()
    assert load_task("sums", "test").name == "sums"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("answer: a\n", ""), r"answer: missing; add answer: …"),
        (("grader: number", "grader: numbre"), r"grader: no grader is named 'numbre' \(did you mean 'number'"),
        (("grader", "gradr"), r"no key is named 'gradr' \(did you mean 'grader'"),
        (("{q}", "{qq}"), r"question: row 0: no field is named 'qq' \(did you mean 'q'"),
        (("{q}", "{q.__class__}"), r"question: \{q.__class__\} is no field"),
        (("{q}", "{q"), r"question: "),
        (("answer: a", "answer: q2"), r"answer: row 0: no field is named 'q2'"),
        (("answer: a", "answer: kind"), r"answer: row 0 has 'even', no number; use grader: text, or filter"),
        (("splits: {test: test}", "splits: {}"), r"splits: empty"),
        (("splits: {test: test}", "splits: test"), r"splits: got \"test\", expected key: value pairs"),
        (("dataset: rows.jsonl", "dataset: [1]"), r"dataset: got \[1\], expected a text"),
        (("dataset: rows.jsonl", "dataset: row.jsonl"), r"no file .*row.jsonl"),
        (("splits", "filter: {kind: none}\nsplits"), r"filter: none of the 40 rows of split 'test' is kept"),
        (("splits", "difficulty: kind\nsplits"), r"difficulty: row 0 has no whole number in 'kind'"),
        (("splits", "tools: [{search: 3}]\nsplits"), r"tools: got \{'search': 3\}, expected a name, or a name with"),
        (("splits", "tools: [{serch: {}}]\nsplits"), r"tools: no tool is named 'serch'"),
        ((PLAIN, "- a\n- b\n"), r"holds a list, expected keys such as dataset, question"),
        ((PLAIN, "a: [b"), r"no YAML"),
    ],
)
def test_a_mistake_is_named_by_file_key_and_fix(folder, change, message):
    path = table(folder, PLAIN.replace(*change), f"{abs(hash(message))}.yaml")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_task(path, "test")[0]
    assert str(folder) in str(caught.value)


def test_a_missing_file_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*x\.yaml; expected a YAML file with dataset, question"):
        load_task(str(tmp_path / "x.yaml"))
