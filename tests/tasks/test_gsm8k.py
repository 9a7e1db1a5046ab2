"""GSM8K: three scores, verified experts, splits that keep the test rows apart, clear errors."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.messages import ToolCall, assistant, calls_of, tool_message
from opd_env.tasks import gsm8k as gsm8k_module
from opd_env.tasks import load_task, require_trainable
from opd_env.tasks.data.splits import split_of
from opd_env.tasks.gsm8k import AnnotationError, annotated_conversation, score_answer
from opd_env.tools import Toolbox

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "gsm8k"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the GSM8K files in ../shared/data/gsm8k")

GOLD = "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18"


def rows(count, name="q"):
    return [
        {"question": f"{name} {number}?", "answer": f"It is <<{number}+1={number + 1}>>x.\n#### {number + 1}"}
        for number in range(count)
    ]


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.jsonl", rows(200))
    write(tmp_path / "test.jsonl", rows(20, "test"))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "strict", "flexible", "numeric"),
    [
        # Verdicts of lm-evaluation-harness 0.4.13 for strict and flexible.
        (GOLD, True, True, True),
        ("#### 18", True, True, True),
        ("####18", False, True, True),
        ("#### $18", False, True, True),
        ("#### 18.", True, True, True),
        ("#### 18.0", False, False, True),
        ("#### 1,8", True, True, False),
        ("#### 18 dollars, or 20", True, False, True),
        ("#### 17\n#### 18", False, True, True),
        ("#### 18\n#### 17", True, False, False),
        ("The answer is $18.", False, True, True),
        ("The answer is 18. That is 9 times 2.", False, False, True),
        ("The answer is 8.", False, False, False),
        ("18 ...", False, False, True),
        ("It is 18 -", False, True, True),
        ("", False, False, False),
        ("none", False, False, False),
    ],
)
def test_the_three_scores(text, strict, flexible, numeric):
    assert score_answer(text, GOLD) == (strict, flexible, numeric)


def test_gold_with_separators_is_compared_as_the_harness_does():
    gold = "It costs $35,200.\n#### 35,200"
    for text in ("#### 35200", "#### 35,200", "#### 3,5200"):
        assert score_answer(text, gold).strict
    assert score_answer("$35,200.00", gold) == (False, False, True)


@given(st.text(alphabet="0123456789.,$-# \nxA") | st.text())
def test_any_text_gets_three_scores(text):
    assert all(isinstance(score, bool) for score in score_answer(text, GOLD))


@pytest.mark.parametrize("text", ["9" * 10**6, "#### " * 200_000, "$.,-" * 250_000, "#### " + "1," * 500_000])
def test_a_megabyte_is_scored_in_linear_time(text):
    start = time.process_time()
    assert score_answer(text, GOLD) == (False, False, False)
    assert time.process_time() - start < 60.0, "a quadratic search would take hours"


def test_a_grade_holds_the_three_scores(folder):
    task = load_task("gsm8k", path=folder)
    right = task.grade(task[0], "The answer is 1.0")
    assert (right.correct, right.extracted, right.scores) == (True, "1", {"strict": 0.0, "flexible": 0.0})
    assert task.grade(task[0], "#### 1 or 2").scores == {"strict": 1.0, "flexible": 0.0}
    assert task.grade(task[0], "1").scores == {"strict": 0.0, "flexible": 1.0}
    assert not task.grade(task[0], None).correct


def test_annotations_become_calculator_calls_between_the_text():
    solution = "Half is 48/2 = $<<48/2=24>>24 a day.\nIn all 48+24=<<48+24=72>>72.\n#### 72"
    with Toolbox(["calculator"]) as toolbox:
        assert annotated_conversation(solution, toolbox) == [
            assistant("Half is 48/2 = $", [ToolCall("calculator", {"expression": "48/2"})]),
            tool_message("calculator", "24"),
            assistant("24 a day.\nIn all 48+24=", [ToolCall("calculator", {"expression": "48+24"})]),
            tool_message("calculator", "72"),
            assistant("72.\n#### 72"),
        ]


@pytest.mark.parametrize(
    ("annotation", "expression", "result"),
    [
        (".5*2=1", ".5*2", "1"),
        ("10/4=2.50", "10/4", "2.5"),
        ("+30+46=76", "+30+46", "76"),
        ("560//10=56", "560//10", "56"),
        ("40000*2=80,000", "40000*2", "80000"),
        ("1/2+1/2=1", "1/2+1/2", "1"),
        ("3-5=-2", "3-5", "-2"),
    ],
)
def test_the_notations_of_the_data_verify(annotation, expression, result):
    with Toolbox(["calculator"]) as toolbox:
        call, answer, _ = annotated_conversation(f"a <<{annotation}>>b\n#### 1", toolbox)
    assert calls_of(call) == (ToolCall("calculator", {"expression": expression}),)
    assert answer["content"] == result


@pytest.mark.parametrize(
    ("solution", "reason"),
    [
        ("48/2 = <<48/2=25>>25\n#### 25", "another value: <<48/2=25>>, the calculator says 24"),
        ("<<10/3=3.33>>3.33\n#### 3", "another value"),
        ("<<48/2=24 clips>>24\n#### 24", "another value"),
        ("<<48/2=>>24\n#### 24", "another value"),
        ("<<x+2=24>>24\n#### 24", "the calculator refuses"),
        ("<<20% of 50=10>>10\n#### 10", "the calculator refuses"),
        ("<<9**9**9=1>>1\n#### 1", "the calculator refuses"),
        ("<<24>>24\n#### 24", "no equals sign"),
        ("half of 48 is 24\n#### 24", "no annotations"),
        ("<<20=20>>20\n#### 20", "no annotations with something to compute"),
    ],
)
def test_an_annotation_that_does_not_verify_gives_no_expert(tmp_path, solution, reason):
    with Toolbox(["calculator"]) as toolbox, pytest.raises(AnnotationError, match=reason):
        annotated_conversation(solution, toolbox)
    write(tmp_path / "train.jsonl", [{"question": "q 1", "answer": solution}])
    task = load_task("gsm8k", path=tmp_path)
    assert task.expert(task[0]) is None


def test_an_annotation_without_a_sum_stays_text():
    with Toolbox(["calculator"]) as toolbox:
        conversation = annotated_conversation("A <<20=20>>20, so <<20+1=21>>21\n#### 21", toolbox)
    assert [message["content"] for message in conversation] == ["A 20, so", "21", "21\n#### 21"]


def test_the_training_file_is_divided_into_training_and_validation(folder):
    splits = {split: load_task("gsm8k", split, path=folder) for split in ("train", "validation", "test")}
    questions = {split: {e.messages[0]["content"] for e in task} for split, task in splits.items()}
    assert len(questions["train"]) + len(questions["validation"]) == 200
    assert not questions["train"] & questions["validation"]
    assert all(split_of(question) == "validation" for question in questions["validation"])
    assert questions["test"] == {row["question"] for row in rows(20, "test")}
    assert [task.train_allowed for task in splits.values()] == [True, False, False]
    with pytest.raises(ValueError, match="split 'test' of task 'gsm8k' is for evaluation only"):
        require_trainable(splits["test"])


def test_ids_are_unique_and_name_the_row(folder):
    train, validation = (load_task("gsm8k", split, path=folder) for split in ("train", "validation"))
    ids = [example.id for example in [*train, *validation]]
    assert len(set(ids)) == 200
    for example in train:
        number = int(example.id.removeprefix("train-"))
        assert example.messages[0]["content"] == f"q {number}?"


def test_a_file_of_another_name_is_divided_among_all_splits(tmp_path):
    write(tmp_path / "mine.jsonl", rows(300))
    splits = [load_task("gsm8k", split, path=tmp_path / "mine.jsonl") for split in ("train", "validation", "test")]
    questions = [{example.messages[0]["content"] for example in task} for task in splits]
    assert sum(map(len, questions)) == len(set.union(*questions)) == 300
    assert all(len(split) > 10 for split in questions)


@pytest.mark.parametrize(("file", "split"), [("test", "train"), ("test", "validation"), ("train", "test")])
def test_a_file_is_not_used_for_a_split_that_it_does_not_hold(folder, file, split):
    for name in (file, f"gsm8k-{file}_2"):
        write(folder / f"{name}.jsonl", rows(5))
        with pytest.raises(ValueError, match=f"holds the {file} rows, so it has no {split} split"):
            load_task("gsm8k", split, path=folder / f"{name}.jsonl")


def test_a_path_may_begin_with_the_home_directory(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert len(load_task("gsm8k", "test", path="~")) == 20


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*train\.jsonl; expected one JSON object a line"):
        load_task("gsm8k", path=tmp_path)


@pytest.mark.parametrize("answer", ["18", "#### eighteen", "####", "#### 18 dollars"])
def test_a_row_without_a_gold_number_is_named_by_file_and_line(folder, answer):
    write(folder / "train.jsonl", [*rows(3), {"question": "q", "answer": answer}])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 4: field 'answer' does not end in '#### '"):
        load_task("gsm8k", path=folder)


def test_without_a_path_the_rows_come_from_the_hub(monkeypatch):
    asked = []

    def hub_rows(*arguments):
        asked.append(arguments)
        return rows(50)

    monkeypatch.setattr(gsm8k_module, "hub_rows", hub_rows)
    assert len(load_task("gsm8k")) + len(load_task("gsm8k", split="validation")) == 50
    assert len(load_task("gsm8k", split="test")) == 50
    assert asked == [("openai/gsm8k", "main", split) for split in ("train", "train", "test")]


@needs_data
def test_the_published_rows_are_all_there():
    sizes = {split: len(load_task("gsm8k", split, path=DATA)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 6701, "validation": 772, "test": 1319}


@needs_data
def test_every_expert_of_the_published_training_rows_verifies():
    without = []
    for split in ("train", "validation"):
        task = load_task("gsm8k", split, path=DATA)
        without += [example.metadata["solution"] for example in task if task.expert(example) is None]
    assert len(without) == 187
    with Toolbox(["calculator"]) as toolbox:
        for solution in without:
            with pytest.raises(AnnotationError, match="no annotations with something to compute"):
                annotated_conversation(solution, toolbox)


@needs_data
def test_the_gold_solutions_get_full_marks():
    for split in ("validation", "test"):
        task = load_task("gsm8k", split, path=DATA)
        for example in task:
            grade = task.grade(example, example.metadata["solution"])
            assert grade.correct
            assert grade.scores == {"strict": 1.0, "flexible": 1.0}


@needs_data
def test_the_last_turn_of_an_expert_is_graded_as_correct():
    task = load_task("gsm8k", "validation", path=DATA)
    experts = [(example, expert) for example in task if (expert := task.expert(example)) is not None]
    assert len(experts) == 753
    for example, expert in experts:
        assert task.grade(example, expert[-1]["content"]).correct
        assert "<<" not in "".join(message["content"] for message in expert)
