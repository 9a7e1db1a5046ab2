"""GSM8K (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168): grade-school word problems, MIT licence.

One row, whose annotations ``<<expression=value>>`` say what a calculator was asked::

    question   Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. …
    answer     Natalia sold 48/2 = <<48/2=24>>24 clips in May.
               Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.
               #### 72

The same row as the expert's conversation::

    assistant  Natalia sold 48/2 =                        calculator(expression="48/2")
    tool       24
    assistant  24 clips in May.
               Natalia sold 48+24 =                       calculator(expression="48+24")
    tool       72
    assistant  72 clips altogether in April and May.
               #### 72

Three scores: ``strict`` and ``flexible`` are those of lm-evaluation-harness 0.4.13 (task ``gsm8k``), to the
letter, applied to the final message only; ``numeric`` compares exact values and decides what is correct. A score
with tools and without the harness's five examples is another protocol than the published one: label it so.

Test it alone: ``pytest tests/tasks/test_gsm8k.py``
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from opd_env.messages import Message, ToolCall, assistant, tool_message, user
from opd_env.tasks.base import Example, Grade, Task
from opd_env.tasks.data.rows import hub_rows, read_jsonl
from opd_env.tasks.data.splits import SPLITS, split_of
from opd_env.tasks.graders.answers import find_number, grade_number, number_value
from opd_env.tasks.registry import register_task
from opd_env.tools import Toolbox

HUB_NAME, HUB_CONFIG = "openai/gsm8k", "main"
FIELDS = {"question": str, "answer": str}

_annotation = re.compile(r"<<([^<>]*)>>")
_plain_number = re.compile(r"\s*[-+]?[0-9.,]+\s*")
_strict = re.compile(r"#### (\-?[0-9\.\,]+)")
_flexible = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_final_point = re.compile(r"\.$")


class Score(NamedTuple):
    """Whether an answer is right, by three rules."""

    strict: bool
    """The first ``#### number`` equals the gold answer as text."""
    flexible: bool
    """The last thing that looks like a number equals the gold answer as text."""
    numeric: bool
    """The final number (``opd_env.tasks.graders.answers``) has exactly the gold answer's value."""


class AnnotationError(ValueError):
    """A worked solution that cannot be turned into verified tool calls; the message is the reason."""


@register_task("gsm8k")
class GSM8K(Task):
    """Grade-school math with a calculator.

    ``validation`` is the tenth of the training rows that ``split_of`` picks by the question's text, so that
    checkpoints are never chosen on the test rows.

    Args:
        split: ``train``, ``validation`` or ``test``.
        path: a folder with ``train.jsonl`` and ``test.jsonl``, or one JSONL file; None loads
            ``openai/gsm8k`` through ``datasets``. A file with the word ``train`` or ``test`` in its name holds
            what that says; a file of any other name is divided among the three splits by ``split_of``.

    Raises:
        ConnectionError: no path, and the hub cannot be reached.
        FileNotFoundError: there is no such file.
        ValueError: a broken row (file, line, reason), or a file that does not hold this split.
    """

    version = "1"
    tools = ("calculator",)
    splits = SPLITS
    licence = "MIT"

    def __init__(self, split: str = "train", *, path: str | Path | None = None) -> None:
        super().__init__(split)
        self._rows = _load(split, None if path is None else Path(path).expanduser())

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Example:
        """The example at ``index``, in the order of the file; its difficulty is the number of annotations."""
        row_id, question, solution = self._rows[index]
        return Example(
            id=row_id,
            messages=(user(question),),
            answer=solution.rpartition("####")[2].strip(),
            difficulty=len(_annotation.findall(solution)),
            metadata={"solution": solution},
        )

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        """Right when the final number equals the gold one; ``strict`` and ``flexible`` are among the scores."""
        grade = grade_number(answer, example.answer)
        score = score_answer(answer or "", example.metadata["solution"])
        scores = {"strict": float(score.strict), "flexible": float(score.flexible)}
        return Grade(grade.correct, grade.extracted, grade.reason, scores)

    def expert(self, example: Example) -> list[Message] | None:
        """The worked solution with its annotations as calculator calls; None when they do not verify."""
        try:
            return self._conversation(example.metadata["solution"])
        except AnnotationError:
            return None

    def _conversation(self, solution: str) -> list[Message]:
        return annotated_conversation(solution, self._toolbox)

    @cached_property
    def _toolbox(self) -> Toolbox:
        return Toolbox(["calculator"])


def score_answer(text: str, gold_text: str) -> Score:
    """Scores a final message against a worked solution (or just its number).

    ``strict`` and ``flexible`` repeat lm-evaluation-harness 0.4.13, ``tasks/gsm8k/gsm8k.yaml``: extract, delete
    ``,`` and ``$``, all up to the last ``#### ``, and a final ``.``; compare as lower-case text. So ``18.0`` is
    not ``18`` to them, but it is to ``numeric``.

    Raises:
        ValueError: ``gold_text`` holds no number.
    """
    strict = _strict.findall(text)
    flexible = _flexible.findall(text)
    return Score(
        strict=bool(strict) and _normalise(strict[0].strip()) == _normalise(gold_text),
        flexible=bool(flexible) and _normalise(next(filter(None, flexible[-1])).strip()) == _normalise(gold_text),
        numeric=grade_number(text, gold_text.rpartition("####")[2]).correct,
    )


def annotated_conversation(solution: str, toolbox: Toolbox) -> list[Message]:
    """Turns ``… <<expression=value>>…`` into text, calculator calls and what the calculator answers.

    Every call is run: the value that the annotation states must be exactly what the calculator answers. An
    annotation with nothing to compute (``<<20=20>>``) is no call; its text stays.

    Args:
        solution: the ``answer`` field of a row.
        toolbox: holds ``calculator``.

    Raises:
        AnnotationError: there are no calls, or one does not verify; ``reason: detail``.
    """
    conversation: list[Message] = []
    pieces = _annotation.split(solution)
    text = pieces[0]
    for annotation, following in zip(pieces[1::2], pieces[2::2], strict=True):
        expression, equals, stated = annotation.rpartition("=")
        if not equals:
            raise AnnotationError(f"no equals sign: <<{annotation}>>")
        result = toolbox.call("calculator", {"expression": expression})
        if not result.ok:
            raise AnnotationError(f"the calculator refuses: <<{annotation}>>: {result.content}")
        if _value(stated) is None or _value(stated) != _value(result.content):
            raise AnnotationError(f"another value: <<{annotation}>>, the calculator says {result.content}")
        if _plain_number.fullmatch(expression):
            text += following
            continue
        conversation.append(assistant(text.strip(), [ToolCall("calculator", {"expression": expression})]))
        conversation.append(tool_message("calculator", result.content))
        text = following
    if not conversation:
        raise AnnotationError("no annotations with something to compute")
    return [*conversation, assistant(text.strip())]


def _normalise(text: str) -> str:
    """The harness's ``regexes_to_ignore``; its ``(?s).*#### `` as a partition, which is not quadratic."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return _final_point.sub("", text).lower()


def _value(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else."""
    text = text.strip()
    return number_value(text) if find_number(text) == text else None


def _load(split: str, path: Path | None) -> list[tuple[str, str, str]]:
    """(id, question, solution) of each row of the split; the id is the source's name and the row's number."""
    source = "test" if split == "test" else "train"
    if path is None:
        rows = hub_rows(HUB_NAME, HUB_CONFIG, source)
    elif path.is_dir():
        rows = read_jsonl(path / f"{source}.jsonl", FIELDS, _check)
    else:
        words = re.split(r"[^a-z]+", path.stem.lower())
        held = "test" if "test" in words else "train" if "train" in words else ""
        if held not in ("", source):
            raise ValueError(
                f"{path} holds the {held} rows, so it has no {split} split; give a folder with both files, "
                f"or rename this one to have its rows divided among {', '.join(SPLITS)}"
            )
        source = held or "all"
        rows = read_jsonl(path, FIELDS, _check)
    return [
        (f"{source}-{number}", row["question"], row["answer"])
        for number, row in enumerate(rows)
        if _split_of(row, source) == split
    ]


def _split_of(row: Mapping[str, str], source: str) -> str:
    if source == "test":
        return "test"
    split = split_of(row["question"])
    return "train" if source == "train" and split == "test" else split


def _check(row: Mapping[str, str]) -> None:
    _, marker, gold = row["answer"].rpartition("####")
    if not marker or _value(gold) is None:
        raise ValueError("field 'answer' does not end in '#### ' and a number")
