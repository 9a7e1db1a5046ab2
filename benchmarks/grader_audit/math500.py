"""MATH-500's two graders, text and `math-verify`, against each other on gold answers and on changed ones.

Run by `run.py`. Gold answers must be right by both. A changed answer on which they differ is listed: the text grader
knows no values, so it is expected to be the stricter of the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from opd_env.tasks.math500 import Math500


def audit(path: str | None) -> int:
    task = Math500(path=path)
    gold = {"exact": 0, "math_verify": 0}
    outputs = stricter = 0
    looser = []
    for example in task:
        for number, answer in enumerate(_changed(example.answer)):
            scores = task.grade(example, rf"So it is \boxed{{{answer}}}.").scores
            if number == 0:
                for name in gold:
                    gold[name] += scores[name] == 1.0
                continue
            outputs += 1
            if scores["exact"] > scores["math_verify"]:
                looser.append(f"- {example.id}: {answer!r} for {example.answer!r} is right as text, not by math-verify")
            elif scores["exact"] < scores["math_verify"]:
                stricter += 1
                print(f"- {example.id}: {answer!r} for {example.answer!r} is right by math-verify, not as text")
    print(*looser, sep="\n")
    print(f"gold: {gold['exact']} of {len(task)} as text, {gold['math_verify']} by math-verify")
    print(f"changed: {outputs} answers, {stricter} right by math-verify only, {len(looser)} right as text only")
    return len(task) - gold["math_verify"]


def _changed(answer: str) -> Iterator[str]:
    """The answer, then the same value in other words, then other values."""
    yield answer
    yield answer.replace(r"\frac", r"\dfrac").replace(" ", "")
    yield re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", answer)
    yield f"{answer}."
    yield f"x={answer}"
    yield f"{answer}+1"
    yield f"-{answer}"
