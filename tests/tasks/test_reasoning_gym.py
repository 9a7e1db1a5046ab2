"""Generated reasoning problems: reproducible, disjoint splits, gold passes, part marks and hostile answers do not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra reasoning-gym")

from opd_env.tasks import load_task
from opd_env.tasks.reasoning_gym import SETS, SPLITS, ReasoningGym


@pytest.mark.parametrize("name", SETS)
def test_gold_passes_in_tags_or_alone_and_other_answers_do_not(name):
    task = ReasoningGym("test", sets=[name])
    for example in task[:5]:
        assert task.grade(example, f"I think <answer>0</answer>, no: <answer> {example.answer} </answer>.").correct
        assert task.grade(example, example.answer).correct
        for wrong in (None, "", "<answer></answer>", "<answer>no idea</answer>", "9" * 5_000):
            grade = task.grade(example, wrong)
            assert not grade.correct
            assert grade.reason


def test_part_marks_are_not_correct():
    task = ReasoningGym("test", sets=["chain_sum"])
    grade = task.grade(task[0], f"<answer>{task[0].answer} or so</answer>")
    assert not grade.correct
    assert 0 < grade.scores["part_marks"] < 1


def test_splits_share_no_question_and_repeat_none():
    texts = {
        split: [example.messages[0]["content"] for example in ReasoningGym(split, sets=["gcd", "lcm"])[:100]]
        for split in SPLITS
    }
    every = [text for split in SPLITS for text in texts[split]]
    assert len(every) == len(set(every))
    assert {example.metadata["category"] for example in ReasoningGym("test", sets=["gcd", "lcm"])[:2]} == {"gcd", "lcm"}


def test_examples_are_the_same_in_every_process():
    code = (
        "from opd_env.tasks.reasoning_gym import *\n"
        f"for e in ReasoningGym('test', sets={SETS})[:60]: print(e.id, e.messages, e.answer)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert len(runs[0].splitlines()) >= 60


def test_an_unknown_or_unsafe_set_is_refused():
    with pytest.raises(ValueError, match=r"no set of reasoning_gym is named 'chain_sums' \(did you mean 'chain_sum'"):
        load_task("reasoning_gym", sets=["chain_sums"])
    with pytest.raises(ValueError, match="no set of reasoning_gym is named 'simple_integration'"):
        ReasoningGym(sets=["simple_integration"])
    with pytest.raises(ValueError, match="sets is empty"):
        ReasoningGym(sets=[])
