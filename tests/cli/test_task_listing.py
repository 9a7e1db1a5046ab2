"""``opd-env tasks``: what a researcher has to know about a task, and whether training questions stand in a test."""

from __future__ import annotations

import json

import pytest

from opd_env.cli.main import main
from opd_env.tasks import load_task, prompt_hash


@pytest.fixture
def table(tmp_path):
    rows = [{"q": f"How much is {n} plus {n}, and why does it matter to anyone at all today?", "a": n} for n in (1, 2)]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[1]) + "\n")
    (tmp_path / "sums.yaml").write_text("dataset: .\nquestion: q\nanswer: a\ngrader: number\nlicence: CC0-1.0\n")
    return str(tmp_path / "sums.yaml")


def test_a_task_is_shown_with_all_that_a_paper_has_to_say(capsys, table):
    assert main(["tasks", table, "--split", "test", "--count", "1"]) == 0
    shown = capsys.readouterr().out
    task = load_task(table, "test")
    for line in (
        "sums, test split, 1 examples",
        f"version      {task.version}",
        "licence      CC0-1.0",
        "splits       train, test",
        "training     refused: this split is for evaluation only",
        "tools        none",
        f"prompt hash  {prompt_hash(task)}",
        "How much is 2 plus 2",
    ):
        assert line in shown


def test_the_prompt_hash_follows_the_question_and_the_tools():
    task = load_task("arithmetic", "test")
    assert prompt_hash(task) == prompt_hash(load_task("arithmetic", "test"))
    assert prompt_hash(task) != prompt_hash(load_task("arithmetic", "test", seed=1))
    without = load_task("arithmetic", "test")
    without.tools = ()
    assert prompt_hash(without) != prompt_hash(task)


def test_every_task_is_listed(capsys):
    assert main(["tasks"]) == 0
    shown = capsys.readouterr().out
    assert "curriculum" in shown
    assert "property" not in shown


def test_the_check_names_what_it_found_and_fails(capsys, table):
    assert main(["tasks", "check", f"{table}:train", f"{table}:test"]) == 1
    shown = capsys.readouterr().out
    assert "1 of 1 questions" in shown
    assert "1 are identical" in shown
    assert "test-0  identical to train-1" in shown
    assert main(["tasks", "check", "arithmetic:validation", "arithmetic:test", "--run-length", "40"]) == 0
    assert "0 of 1000 questions" in capsys.readouterr().out


def test_mistakes_are_named(capsys):
    for words, message in (
        (["check", "arithmetic"], "takes NAME, or check A:train B:test, got 'check arithmetic'"),
        (["check", "arithmetic", "arithmetic:test"], "got 'arithmetic', expected a task and its split"),
        (["check", "arithmetic:tset", "arithmetic:test"], "is named 'tset' (did you mean 'test'?)"),
    ):
        assert main(["tasks", *words]) == 2
        assert message in capsys.readouterr().err
