"""MATH-500: two graders that judge on their own, hostile answers that cost two seconds at most."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.tasks import load_task, require_trainable
from opd_env.tasks.graders.boxed import last_boxed, normalise

pytest.importorskip("math_verify", reason="needs the extra 'math'")
from opd_env.tasks.graders.equivalence import MAX_CHARS, TIMEOUT_S, equivalent
from opd_env.tools import ToolError, ToolErrorKind

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "math500"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the MATH-500 file in ../shared/data/math500")
HOSTILE = "2^{2^{2^{2^{2^{2}}}}} - 2^{2^{2^{2^{2^{2}}}}} + 3"


@pytest.fixture
def task(tmp_path):
    row = {"problem": "Half of 1?", "answer": r"\frac{1}{2}", "subject": "Algebra", "level": 2, "unique_id": "a/1"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    return load_task("math500", "test", path=tmp_path)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{5}, then \boxed{6}.", "6"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{5} and } more }", "5"),
        (r"\boxed{5} \boxed{6", "5"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        ("5", None),
        ("{5}", None),
        ("", None),
    ],
)
def test_the_last_box_is_read(text, content):
    assert last_boxed(text) == content


@given(st.text() | st.text(alphabet="\\boxed{}1 "))
def test_any_text_is_read(text):
    content = last_boxed(text)
    assert content is None or content in text
    normalise(text)


@pytest.mark.parametrize(
    "text",
    ["\\boxed{" * 150_000, "}" * 10**6, "\\boxed{" + "{" * 10**6, "\\boxed{}" * 125_000, "\\text{" * 170_000],
    ids=["boxes", "closed", "open", "empty", "text"],
)
def test_a_megabyte_is_read_in_linear_time(text):
    start = time.process_time()
    last_boxed(text)
    normalise(text)
    assert time.process_time() - start < 60.0, "a quadratic search would take hours"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"),
        (r"\frac12", r"\tfrac{1}{2}"),
        (r"10\%", "10"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"90^\circ", "90"),
        ("1,\\!000", "1,000"),
        ("5.", "$5$"),
    ],
)
def test_layout_does_not_count_in_the_exact_comparison(left, right):
    assert normalise(left) == normalise(right)


def test_different_answers_stay_different():
    assert normalise(r"\leftarrow") != normalise("arrow")
    assert normalise("(1,2)") != normalise("[1,2]")


@pytest.mark.parametrize(
    ("answer", "correct", "exact", "value"),
    [
        (r"So it is \boxed{\frac{1}{2}}.", True, 1.0, 1.0),
        (r"\boxed{\dfrac12}", True, 1.0, 1.0),
        (r"\boxed{0.5}", True, 0.0, 1.0),
        (r"\boxed{\frac{2}{4}}", True, 0.0, 1.0),
        (r"\boxed{2}", False, 0.0, 0.0),
        (r"\boxed{}", False, 0.0, 0.0),
    ],
)
def test_two_graders_judge_an_answer(task, answer, correct, exact, value):
    grade = task.grade(task[0], answer)
    assert grade.correct == correct
    assert grade.scores == {"exact": exact, "math_verify": value}
    assert (grade.reason == "") == correct


def test_an_answer_without_a_box_is_wrong(task):
    assert task.grade(task[0], "1/2").reason == r"no \boxed{…} in the answer"
    assert not task.grade(task[0], None).correct


def test_a_hostile_answer_costs_the_time_limit_and_one_worker(task):
    equivalent("1", "1")
    start = time.monotonic()
    grade = task.grade(task[0], rf"\boxed{{{HOSTILE}}}")
    assert time.monotonic() - start < TIMEOUT_S + 60
    assert not grade.correct
    assert "math-verify" in grade.reason
    assert task.grade(task[0], r"\boxed{0.5}").correct


def test_a_long_answer_is_not_compared():
    with pytest.raises(ToolError, match="1001 characters") as caught:
        equivalent("1", "1" * (MAX_CHARS + 1))
    assert caught.value.kind is ToolErrorKind.SCHEMA


def test_answers_can_be_compared_in_any_thread():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(equivalent("0.5", r"\frac{1}{2}")))
    thread.start()
    thread.join()
    assert verdicts == [True]


def test_a_problem_says_how_to_give_the_answer(task):
    example = task[0]
    assert example.messages[0]["content"] == "Half of 1?\n\nPut your final answer into \\boxed{}."
    assert (example.id, example.difficulty, example.metadata) == ("a/1", 2, {"subject": "Algebra"})


def test_nothing_of_it_may_be_trained_on(task):
    with pytest.raises(ValueError, match="nothing of this task may be trained on"):
        require_trainable(task)
    with pytest.raises(ValueError, match=r"no split of .* is named 'train'; known: test"):
        load_task("math500")


def test_without_math_verify_the_message_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "opd_env.tasks.graders.equivalence")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install 'opd-env\[math\]'"):
        load_task("math500", "test", path=tmp_path)


@needs_data
@pytest.mark.slow
def test_both_graders_accept_every_gold_answer():
    task = load_task("math500", "test", path=DATA)
    assert len(task) == 500
    assert len({example.id for example in task}) == 500
    for example in task:
        grade = task.grade(example, rf"The answer is $\boxed{{{example.answer}}}$.")
        assert grade.scores == {"exact": 1.0, "math_verify": 1.0}, example.answer
