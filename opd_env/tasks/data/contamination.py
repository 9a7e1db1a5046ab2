"""Whether questions of one set stand in another: runs of equal words (n-grams) of training and test questions.

Worked example::

    found = overlap(load_task("gsm8k"), load_task("gsm8k", "test"))
    found.shared        # test questions that share 13 words in a row with a training question
    found.hits[0]       # Hit(test_id='test-511', train_id='train-2013', share=1.0, identical=True, …)

Case and punctuation do not count; numbers do. A question of fewer than n words counts as one run. Runs that a tenth of
the test questions hold are the wording of the task, such as "End with a line 'Answer:'", and count for nothing unless
the whole question is equal. Exact: runs are compared as they are, not by a hash that could collide.

Test it alone: ``pytest tests/tasks/data/test_contamination.py``
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from opd_env.tasks.base import Example

WORDS = 13
"""Length of a run, as in the GPT-3 report (Brown et al. 2020, appendix C)."""
COMMON = 0.1
_word = re.compile(r"\w+")


@dataclass(frozen=True)
class Hit:
    """A test question of which something stands in the training questions."""

    test_id: str
    train_id: str
    """The training question that shares the most runs with it."""
    share: float
    """Share of the test question's runs that stand in any training question; 1 is all."""
    identical: bool
    """The training question has the same words in the same order."""
    example: str
    """A run that both have."""


@dataclass(frozen=True)
class Overlap:
    """What a comparison found."""

    train: int
    """Training questions."""
    test: int
    """Test questions."""
    words: int
    """Length of a run."""
    hits: tuple[Hit, ...]
    """Those that share something, the greatest share first."""

    @property
    def shared(self) -> int:
        """Test questions that share a run."""
        return len(self.hits)

    @property
    def identical(self) -> int:
        """Test questions that stand whole among the training questions."""
        return sum(hit.identical for hit in self.hits)


def overlap(train: Iterable[Example], test: Iterable[Example], words: int = WORDS) -> Overlap:
    """Compares every test question with every training question, in time linear in their length.

    Args:
        train, test: examples; what the user says in them is compared, system messages are not.
        words: length of a run; shorter finds more, by chance too.

    Raises:
        ValueError: ``words`` is not positive.
    """
    if words < 1:
        raise ValueError(f"words={words}, expected 1 or more")
    tests = [(example.id, _words(example)) for example in test]
    runs = [set(_runs(text, words)) for _, text in tests]
    holders = Counter(run for one in runs for run in one)
    wording = {run for run, count in holders.items() if count > max(1, COMMON * len(tests))}
    where: dict[str, list[int]] = defaultdict(list)
    whole: dict[str, list[int]] = defaultdict(list)
    for number, (_, text) in enumerate(tests):
        whole[" ".join(text)].append(number)
        for run in runs[number] - wording:
            where[run].append(number)
    found: dict[int, set[str]] = defaultdict(set)
    best: dict[int, tuple[bool, int, str, str]] = {}
    size = 0
    for size, example in enumerate(train, start=1):  # noqa: B007
        text = _words(example)
        shared: dict[int, list[str]] = defaultdict(list)
        for run in dict.fromkeys(_runs(text, words)):
            for number in where.get(run, ()):
                shared[number].append(run)
        same = whole.get(" ".join(text), [])
        for number in {*shared, *same}:
            found[number].update(shared[number])
            sample = shared[number][0] if shared[number] else " ".join(text)
            candidate = (number in same, len(shared[number]), example.id, sample)
            if number not in best or candidate[:2] > best[number][:2]:
                best[number] = candidate
    hits = [
        Hit(
            test_id=tests[number][0],
            train_id=train_id,
            share=1.0 if identical else len(found[number]) / len(runs[number] - wording),
            identical=identical,
            example=sample,
        )
        for number, (identical, _, train_id, sample) in best.items()
    ]
    hits.sort(key=lambda hit: (-hit.identical, -hit.share, hit.test_id))
    return Overlap(size, len(tests), words, tuple(hits))


def _words(example: Example) -> list[str]:
    text = " ".join(message["content"] for message in example.messages if message["role"] == "user")
    return _word.findall(text.casefold())


def _runs(text: list[str], words: int) -> list[str]:
    """Every run of ``words`` words; the whole text when it is shorter."""
    if len(text) <= words:
        return [" ".join(text)] if text else []
    return [" ".join(text[start : start + words]) for start in range(len(text) - words + 1)]
