"""HotpotQA (CC BY-SA 4.0) and MuSiQue (CC BY 4.0): questions that need facts from several Wikipedia passages.

One problem of HotpotQA::

    user       If Gallu is a demon Lilu is what?
               Search as often as you need. End with a line "Answer: " and the shortest answer.
    assistant  search(query="Lilu mythology")
    tool       [1] Lilu (mythology): A lilu or lilû is a masculine Akkadian word for a spirit, …
    right      … Answer: a spirit

Every question comes with passages, most of which do not help. The search tool finds those of all questions of the
split together, so a question has to be asked well. Graded by exact match after normalisation; F1 is among the scores.

Test it alone: ``pytest tests/tasks/test_multi_hop.py``
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from opd_env.messages import Message, user
from opd_env.tasks.base import Example, Grade, Task
from opd_env.tasks.data.rows import hub_rows, read_json, read_jsonl
from opd_env.tasks.graders.answers import grade_text
from opd_env.tools.builtin.search import make_search_tool

INSTRUCTION = 'Search as often as you need. End with a line "Answer: " and the shortest answer.'


@dataclass(frozen=True)
class Question:
    """A row of either data set."""

    id: str
    text: str
    answers: tuple[str, ...]
    hops: int
    category: str
    passages: tuple[tuple[str, str], ...]
    """Title and text of each."""


class MultiHop(Task):
    """Questions over passages, with a search tool over the passages of the whole split.

    Args:
        split: ``train`` or ``validation``, which is the set that results are published on.
        path: a JSONL file, a JSON list (``….json``), or a folder with ``train.jsonl`` and ``validation.jsonl``; None
            loads the set through ``datasets``.

    Raises:
        ConnectionError: no path, and the hub cannot be reached.
        FileNotFoundError: there is no such file.
        ValueError: another split, or a broken row.
    """

    version = "1"
    splits = ("train", "validation")
    hub: ClassVar[tuple[str, str | None]]

    def __init__(self, split: str = "train", *, path: str | Path | None = None) -> None:
        super().__init__(split)
        rows = hub_rows(*self.hub, split) if path is None else _local_rows(Path(path).expanduser(), split)
        try:
            self._questions = [self.read(row) for row in rows if row.get("answerable", True)]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path or self.hub[0]} holds rows of another form: {error!r}") from error
        found = dict.fromkeys(passage for question in self._questions for passage in question.passages)
        self.tools = (make_search_tool([{"title": title, "text": text} for title, text in found if text.strip()]),)

    @staticmethod
    @abstractmethod
    def read(row: Mapping[str, Any]) -> Question:
        """What a row says."""

    def __len__(self) -> int:
        return len(self._questions)

    def example(self, index: int) -> Example:
        """The example at ``index``, in the order of the rows; its difficulty is the number of hops."""
        question = self._questions[index]
        return Example(
            id=question.id,
            messages=(user(f"{question.text}\n{INSTRUCTION}"),),
            answer=question.answers[0],
            difficulty=question.hops,
            metadata={"answers": list(question.answers), "category": question.category},
        )

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        """Right when the short answer is one of the accepted ones."""
        return grade_text(answer, example.metadata["answers"])


class HotpotQA(MultiHop):
    """HotpotQA with search over the passages of its distractor setting (Yang et al. 2018)."""

    licence = "CC-BY-SA-4.0"
    hub = ("hotpotqa/hotpot_qa", "distractor")

    @staticmethod
    def read(row: Mapping[str, Any]) -> Question:
        """Reads a row as the hub has it or as its authors published it."""
        context = row["context"]
        if isinstance(context, Mapping):
            context = zip(context["title"], context["sentences"], strict=True)
        passages = tuple((title, "".join(sentences)) for title, sentences in context)
        return Question(row.get("_id") or row["id"], row["question"], (row["answer"],), 2, row["type"], passages)


class MuSiQue(MultiHop):
    """MuSiQue (answerable) with search over its passages (Trivedi et al. 2022)."""

    licence = "CC-BY-4.0"
    hub = ("dgslibisey/MuSiQue", None)

    @staticmethod
    def read(row: Mapping[str, Any]) -> Question:
        """Reads a row; ids such as ``3hop1__…`` begin with the number of hops."""
        passages = tuple((passage["title"], passage["paragraph_text"]) for passage in row["paragraphs"])
        kind = row["id"].partition("__")[0]
        return Question(
            row["id"], row["question"], (row["answer"], *row["answer_aliases"]), int(kind[0]), kind, passages
        )


def _local_rows(path: Path, split: str) -> list[dict[str, Any]]:
    path = path / f"{split}.jsonl" if path.is_dir() else path
    fields = {"question": str, "answer": str}
    return read_json(path, fields) if path.suffix == ".json" else read_jsonl(path, fields)
