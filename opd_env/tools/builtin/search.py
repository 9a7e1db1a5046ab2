"""Search over passages that are given: BM25 (Lucene's form, by bm25s), nothing leaves the machine.

Worked example::

    search = make_search_tool([
        {"title": "Kabul", "text": "Kabul is the capital city of Afghanistan."},
        {"title": "Borders of Chad", "text": "Chad shares land borders with Niger and Libya."},
    ])
    Toolbox([search]).call("search", {"query": "capital of Afghanistan"}).content
    # '[1] Kabul: Kabul is the capital city of Afghanistan.'

Passages are rows with ``text`` and optionally ``title``: a list, a ``datasets.Dataset``, or the path of a JSONL file. A
large index is made once and then mapped into memory, which takes a moment whatever its size, and which processes
share::

    BM25Index(load_passages("wikipedia.jsonl")).save("wikipedia.index")
    make_search_tool("wikipedia.index")

A student sees one passage a line, the best first; of equal scores the one that stands first in the corpus. Passages
that share no word with the query are never shown.

Test it alone: ``pytest tests/tools/builtin/test_search.py``
"""

from __future__ import annotations

import json
import mmap
import re
import tempfile
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_env.tools.contract import Tool, tool
from opd_env.tools.tool_error import cut

MAX_QUERY_CHARS = 1000
"""Characters of a query that are read."""
MAX_PASSAGE_CHARS = 800
"""Characters of one passage that are shown."""
# C0 and C1 control characters, and what turns the direction of writing.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_FORMAT = {"format": "opd-env BM25 index", "version": 1}
_SAMPLE_EVERY = 32

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
        """At most ``k`` passages, the best first."""
        import numpy as np

        (words,) = _words([query])
        known = [word for word in words if word in self._bm25.vocab_dict]
        if not known:
            return []
        scores = self._bm25.get_scores(known)
        found = np.flatnonzero(scores > 0)
        if len(found) > _SAMPLE_EVERY * k:
            # The k-th best of a part is no better than the k-th best of all, so this drops none of the k best and
            # nearly all others.
            found = found[scores[found] >= np.partition(scores[found[::_SAMPLE_EVERY]], -k)[-k]]
        if len(found) > k:
            last = np.partition(scores[found], -k)[-k]
            better = found[scores[found] > last]
            found = np.concatenate([better, found[scores[found] == last][: k - len(better)]])
        best = found[np.argsort(-scores[found], kind="stable")]
        return [self._passages[index] for index in best]

    def save(self, folder: str | Path) -> None:
        """Writes the index and its passages into a new folder, whole or not at all.

        Raises:
            FileExistsError: there is something already.
        """
        import numpy as np

        final = Path(folder)
        if final.exists():
            raise FileExistsError(f"{final} exists already; remove it, or choose another folder")
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}.") as unfinished:
            inside = Path(unfinished) / "index"
            self._bm25.save(inside)
            offsets = [0]
            with (inside / "passages.jsonl").open("wb") as lines:
                for passage in self._passages:
                    row = {"title": passage.title, "text": passage.text}
                    offsets.append(offsets[-1] + lines.write(json.dumps(row).encode() + b"\n"))
            np.save(inside / "offsets.npy", np.asarray(offsets, dtype=np.int64))
            (inside / "about.json").write_text(json.dumps({**_FORMAT, "passages": len(self._passages)}) + "\n")
            inside.rename(final)

    @classmethod
    def load(cls, folder: str | Path) -> BM25Index:
        """Maps a saved index into memory; nothing is read before it is needed.

        Raises:
            ValueError: the folder holds no index that ``save`` wrote whole.
        """
        import bm25s

        folder = Path(folder)
        index = cls.__new__(cls)
        try:
            about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            if about != {**_FORMAT, "passages": about.get("passages")}:
                raise ValueError(f"about.json holds {about}, expected {_FORMAT}")
            index._passages = _SavedPassages(folder, about["passages"])
            index._bm25 = bm25s.BM25.load(folder, mmap=True)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder} holds no search index: {error}; make it anew with BM25Index.save") from error
        return index


class _SavedPassages(Sequence[Passage]):
    """The passages of a saved index, each read from the disk when it is asked for."""

    def __init__(self, folder: Path, count: int) -> None:
        import numpy as np

        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        with (folder / "passages.jsonl").open("rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._offsets) != count + 1 or self._offsets[-1] != len(self._lines):
            raise ValueError(f"its passages are not the {count} that were saved")

    def __getitem__(self, index: Any) -> Any:
        start, stop = self._offsets[index : index + 2]
        return Passage(**json.loads(self._lines[start:stop]))

    def __len__(self) -> int:
        return len(self._offsets) - 1


def make_search_tool(
    passages: PassageRows | str | Path | SearchIndex, *, k: int = 3, max_k: int = 10, name: str = "search"
) -> Tool:
    """Searches passages that are given, by keywords (BM25).

    Args:
        passages: rows, the path of a JSONL file of rows, an index, or the folder of a saved one.
        k: results when the student does not say how many.
        max_k: most results; a student's ``k`` is brought into 1..max_k instead of refused.
        name: of the tool.

    Raises:
        ValueError: no passages, or a row that is none; file and line are named.
        FileNotFoundError: there is no such file.
    """
    if not 1 <= k <= max_k:
        raise ValueError(f"k={k} and max_k={max_k}, expected 1 <= k <= max_k")
    if isinstance(passages, SearchIndex):
        index = passages
    elif isinstance(passages, str | Path) and Path(passages).is_dir():
        index = BM25Index.load(passages)
    else:
        index = BM25Index(load_passages(passages))
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
    return cut(line, MAX_PASSAGE_CHARS)


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
