"""Search over passages that are given: BM25 (Lucene's form, by bm25s), nothing leaves the machine.

Worked example::

    search = make_search_tool([
        {"title": "Kabul", "text": "Kabul is the capital city of Afghanistan."},
        {"title": "Borders of Chad", "text": "Chad shares land borders with Niger and Libya."},
    ])
    Toolbox([search]).call("search", {"query": "capital of Afghanistan"}).content
    # '[1] Kabul: Kabul is the capital city of Afghanistan.'

Passages come as dictionaries with ``text`` and optionally ``title`` (other fields are ignored): a list, a
``datasets.Dataset``, or the path of a JSONL file. A student sees one passage a line, the best first; of equal
scores the one that stands first in the corpus. Passages that share no word with the query are never shown.

Test it alone: ``pytest tests/tools/test_search.py``
"""

from __future__ import annotations

import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_env.tools.base import Tool, tool

MAX_QUERY_CHARS = 1000
"""Characters of a query that are read."""
MAX_PASSAGE_CHARS = 800
"""Characters of one passage that are shown."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

PassageRows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Passage:
    """One text that can be found."""

    text: str
    title: str = ""

    def __str__(self) -> str:
        return f"{self.title}: {self.text}" if self.title else self.text


class SearchIndex(ABC):
    """Something that finds passages."""

    @abstractmethod
    def search(self, query: str, k: int) -> Sequence[Passage]:
        """At most ``k`` passages that match, the best first. The same query gives the same answer."""


class BM25Index(SearchIndex):
    """Ranks passages by BM25 over their titles and texts; English stop words, case and accents do not count.

    Raises:
        ValueError: there are no passages, or no words in them.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        import bm25s

        if not passages:
            raise ValueError("a search index needs at least one passage")
        self._passages = passages
        self._bm25 = bm25s.BM25()
        words = _words([str(passage) for passage in passages])
        if not any(words):
            raise ValueError("none of the passages holds a word that could be searched for")
        self._bm25.index(words, show_progress=False)

    def search(self, query: str, k: int) -> list[Passage]:
        """See ``SearchIndex.search``."""
        import numpy as np

        (words,) = _words([query])
        known = [word for word in words if word in self._bm25.vocab_dict]
        if not known:
            return []
        scores = self._bm25.get_scores(known)
        found = np.flatnonzero(scores > 0)
        if len(found) > k:
            # All that reach the k-th best score, so that ties can be broken by position below.
            found = found[scores[found] >= np.partition(scores[found], -k)[-k]]
        best = found[np.argsort(-scores[found], kind="stable")][:k]
        return [self._passages[index] for index in best]


class ExactIndex(SearchIndex):
    """Answers exactly the queries that it is given, and finds nothing for any other: for tests."""

    def __init__(self, answers: Mapping[str, Sequence[Passage]]) -> None:
        self._answers = dict(answers)

    def search(self, query: str, k: int) -> Sequence[Passage]:
        """See ``SearchIndex.search``."""
        return self._answers.get(query, ())[:k]


def make_search_tool(
    passages: PassageRows | str | Path | SearchIndex, *, k: int = 3, max_k: int = 10, name: str = "search"
) -> Tool:
    """Searches passages that are given, by keywords (BM25).

    Args:
        passages: rows with ``text`` and optionally ``title``, the path of a JSONL file of such rows, or an index.
        k: results when the student does not say how many.
        max_k: most results; a student's ``k`` is brought into 1..max_k instead of refused.
        name: of the tool.

    Raises:
        ValueError: no passages, or a row that is none; file and line are named.
        FileNotFoundError: there is no such file.
    """
    if not 1 <= k <= max_k:
        raise ValueError(f"k={k} and max_k={max_k}, expected 1 <= k <= max_k")
    index = passages if isinstance(passages, SearchIndex) else BM25Index(load_passages(passages))
    default_k = k

    @tool(name=name, deterministic=True, max_output_chars=max_k * (MAX_PASSAGE_CHARS + 10))
    def search(query: str, k: int = default_k) -> str:
        """Searches a collection of texts by keywords.

        Args:
            query: keywords
            k: number of results
        """
        found = index.search(query[:MAX_QUERY_CHARS], min(max(k, 1), max_k))
        return "\n".join(f"[{rank}] {_show(passage)}" for rank, passage in enumerate(found, 1)) or "no results"

    return search


def load_passages(source: PassageRows | str | Path) -> list[Passage]:
    """Reads passages from rows or from a JSONL file.

    Raises:
        ValueError: a row is no passage; file and line (or the row's number) are named.
        FileNotFoundError: there is no such file.
    """
    if not isinstance(source, str | Path):
        return [_passage(row, f"passage {number}") for number, row in enumerate(source)]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a JSONL file with one passage a line")
    passages = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: no valid JSON: {error}") from error
                passages.append(_passage(row, f"{path}:{number}"))
    return passages


def _passage(row: object, where: str) -> Passage:
    text, title = (row.get("text"), row.get("title") or "") if isinstance(row, Mapping) else (None, "")
    if not isinstance(text, str) or not isinstance(title, str) or not text.strip():
        raise ValueError(f"{where}: got {str(row)[:100]}, expected an object with a text in 'text' (and in 'title')")
    return Passage(text, title)


def _show(passage: Passage) -> str:
    """One line without control characters. Whatever else stands in a passage stays text."""
    line = _CONTROL.sub("", " ".join(str(passage).split()))
    return line if len(line) <= MAX_PASSAGE_CHARS else f"{line[: MAX_PASSAGE_CHARS - 1]}…"


def _words(texts: list[str]) -> list[list[str]]:
    """The words of each text, as the index counts them."""
    import bm25s

    plain = [text if text.isascii() else _without_accents(text) for text in texts]
    words: list[list[str]] = bm25s.tokenize(
        plain, token_pattern=r"(?u)\w+", stopwords="en", return_ids=False, show_progress=False
    )
    return words


def _without_accents(text: str) -> str:
    return "".join(mark for mark in unicodedata.normalize("NFKD", text) if not unicodedata.combining(mark))
