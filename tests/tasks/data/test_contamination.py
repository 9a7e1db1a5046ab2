"""Shared runs of words: found exactly where they are, by a second, slower way of looking too."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.messages import system, user
from opd_env.tasks import Example, load_task
from opd_env.tasks.data.contamination import overlap

DATA = Path(__file__).parents[3] / ".." / "shared" / "data" / "gsm8k"
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def questions(*texts):
    return [Example(str(number), (system("Be brief."), user(text)), "1") for number, text in enumerate(texts)]


def found(train, test, **options):
    return {(hit.test_id, hit.train_id, hit.identical) for hit in overlap(train, test, **options).hits}


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not():
    test = questions(LONG, "nothing of the kind")
    thirteen, twelve = (" ".join(LONG.split()[:count]) for count in (13, 12))
    assert found(questions("Here: " + thirteen), test) == {("0", "0", False)}
    assert found(questions("Here: " + twelve + " here it differs"), test) == set()


def test_case_and_punctuation_do_not_count_and_numbers_do():
    test = questions("Ann has 12 pens, and Tom has 7. How many do they have together?")
    assert overlap(questions("ann has 12 PENS and tom has 7 how many do they have together"), test).identical == 1
    assert overlap(questions("Ann has 13 pens, and Tom has 7. How many do they have together?"), test).identical == 0


def test_short_questions_are_compared_whole():
    result = overlap(questions("What is 2+2?", "What is 3+3?"), questions("What is 3 + 3?", "What is 3?"))
    assert [(hit.test_id, hit.train_id, hit.share, hit.identical) for hit in result.hits] == [("0", "1", 1.0, True)]


def test_the_share_counts_the_runs_of_the_test_question():
    (hit,) = overlap(questions(LONG + " and more words"), questions(LONG + " but other words")).hits
    assert hit.share == pytest.approx(3 / 6)
    assert hit.example == " ".join(LONG.split()[:13])


def test_the_wording_of_a_task_is_no_contamination():
    tail = "End with a line that says the answer and nothing else at all please now"
    test = questions(*(f"Question {number}? {tail}" for number in range(30)))
    assert found(questions(f"Something else? {tail}"), test) == set()
    assert found(questions(f"Question 7? {tail}"), test) == {("7", "0", True)}


@given(
    st.lists(st.text("ab ", max_size=12), min_size=1, max_size=6),
    st.lists(st.text("ab ", max_size=12), min_size=1, max_size=6),
    st.integers(1, 4),
)
def test_it_finds_what_looking_at_every_pair_finds(train, test, words):
    def runs(text):
        split = text.split()
        if len(split) <= words:
            return {tuple(split)} if split else set()
        return {tuple(split[start : start + words]) for start in range(len(split) - words + 1)}

    every = [runs(text) for text in test]
    limit = max(1, 0.1 * len(test))
    wording = {run for one in every for run in one if sum(run in other for other in every) > limit}
    expected = {
        str(number)
        for number, one in enumerate(every)
        if any((runs(text) & one) - wording or text.split() == test[number].split() for text in train)
    }
    assert {hit.test_id for hit in overlap(questions(*train), questions(*test), words).hits} == expected


def test_no_words_are_no_run_length():
    with pytest.raises(ValueError, match="words=0, expected 1 or more"):
        overlap([], [], 0)


def test_splits_of_generated_tasks_share_no_question():
    result = overlap(load_task("arithmetic", "validation"), load_task("arithmetic", "test"))
    assert (result.train, result.test, result.identical) == (1000, 1000, 0)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/gsm8k")
def test_gsm8k_is_compared_in_a_few_seconds():
    result = overlap(load_task("gsm8k", path=DATA), load_task("gsm8k", "test", path=DATA))
    assert result.test == 1319
    assert result.identical == 0
    assert 0 < result.shared < 30
