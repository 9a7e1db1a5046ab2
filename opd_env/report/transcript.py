"""A trajectory as coloured passages of text, for people to read.

Worked example::

    for block in transcript(trajectory, decode):        # decode: token ids to text; None shows whole turns
        for passage in block.passages:
            print(passage.kind, repr(passage.text))         # tool_call '<tool_call>\\n{"name": …'

Texts are untrusted: characters that would hide or reorder others are written out.

Test it alone: ``pytest tests/report/test_transcript.py``
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from opd_env.episode.trajectory import Decode, Trajectory, TurnRecord
from opd_env.formats.base import TokenKind
from opd_env.formats.hermes import parse_hermes

MOST_CHARACTERS = 4000
"""Longer passages are cut, and say so."""

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
_TOKENS_OF_A_CHARACTER = 8
"""A byte-level token may be part of a character; more than this many in a row are no text."""


@dataclass(frozen=True)
class Passage:
    """Text of one kind; a sampled token where tokens can be decoded."""

    kind: str
    """Name of a ``TokenKind`` in lower case."""
    text: str
    note: str = ""
    """What the pointer shows: the token's log-prob."""
    log_ratio: float | None = None
    """Teacher minus student log-prob."""


@dataclass(frozen=True)
class Block:
    """What one side said in one turn."""

    role: str
    """``prompt``, ``student``, ``tools`` or ``user``."""
    turn: int
    passages: tuple[Passage, ...]
    errors: tuple[str, ...] = ()
    """Kinds of the errors that the tools answered."""
    retries: int = 0
    """How often the tools tried the turn's calls again."""


def transcript(
    trajectory: Trajectory, decode: Decode | None = None, log_ratio_T: NDArray[np.float32] | None = None
) -> list[Block]:
    """The episode, block by block.

    Args:
        trajectory: a finished episode.
        decode: text of token ids, special tokens written out. Without it the records of turns and calls are
            shown, which lack prompt and scaffold.
        log_ratio_T: teacher minus student log-prob per token, shape ``[T]``; read where tokens were sampled.
    """
    if decode is None:
        return [block for number, turn in enumerate(trajectory.turns, 1) for block in _records(turn, number)]
    blocks = []
    sides = zip(trajectory.turn.tolist(), trajectory.sampled.tolist(), strict=True)
    for (turn, sampled), group in groupby(enumerate(sides), key=lambda entry: entry[1]):
        indices = [index for index, _ in group]
        start, stop = indices[0], indices[-1] + 1
        if sampled:
            passages = tuple(_tokens(trajectory, start, stop, decode, log_ratio_T))
        else:
            passages = tuple(_context(trajectory, start, stop, decode))
            if passages[0].text.startswith("\n"):  # as a line break it would look like an empty line of the student
                passages = (replace(passages[0], text="↵" + passages[0].text[1:]), *passages[1:])
        if turn == 0 or sampled:
            blocks.append(Block("student" if sampled else "prompt", turn, passages))
        elif trajectory.turns[turn - 1].user is not None:
            blocks.append(Block("user", turn, passages))
        else:
            blocks.append(Block("tools", turn, passages, *_outcome(trajectory.turns[turn - 1])))
    return blocks


def visible(text: str) -> str:
    """The text with control, invisible and direction-changing characters written out, such as ``⟦U+202E⟧``."""
    return _UNSEEN.sub(lambda match: f"⟦U+{ord(match.group()):04X}⟧", text)


def shorten(text: str) -> str:
    """At most ``MOST_CHARACTERS`` of the text, and how many more there are."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} … {len(text) - MOST_CHARACTERS:,} more characters"


def _tokens(
    trajectory: Trajectory, start: int, stop: int, decode: Decode, log_ratio_T: NDArray[np.float32] | None
) -> Iterator[Passage]:
    """One passage per token, or per few tokens that make a character together."""
    ids = trajectory.token_ids.tolist()
    while start < stop:
        end, text = start + 1, decode(ids[start : start + 1])
        while "\ufffd" in text and end < min(stop, start + _TOKENS_OF_A_CHARACTER):
            end += 1
            text = decode(ids[start:end])
        if "\ufffd" in text:
            end, text = start + 1, decode(ids[start : start + 1])
        logprob = float(trajectory.logprobs[start:end].sum())
        log_ratio = None if log_ratio_T is None else float(log_ratio_T[start:end].sum())
        note = f"student log-prob {logprob:.2f}"
        if log_ratio is not None:
            note += f", teacher {logprob + log_ratio:.2f}"
        yield Passage(_kind(trajectory, start), visible(text), note, log_ratio)
        start = end


def _context(trajectory: Trajectory, start: int, stop: int, decode: Decode) -> Iterator[Passage]:
    """One passage per stretch of tokens of a kind."""
    for kind, group in groupby(range(start, stop), key=lambda index: _kind(trajectory, index)):
        indices = list(group)
        yield Passage(kind, visible(shorten(decode(trajectory.token_ids[indices].tolist()))))


def _records(turn: TurnRecord, number: int) -> Iterator[Block]:
    """A turn's blocks without tokens."""
    yield Block("student", number, tuple(_spans(turn.text)))
    if turn.calls:
        outputs = tuple(Passage("tool_output", visible(shorten(call.output)) + "\n") for call in turn.calls)
        yield Block("tools", number, outputs, *_outcome(turn))
    if turn.user is not None:
        yield Block("user", number, (Passage("scaffold", visible(shorten(turn.user))),))


def _spans(text: str) -> Iterator[Passage]:
    parsed = parse_hermes(text)  # what has no tokens is of a chat server, whose calls are written as Hermes blocks
    spans = sorted([(call.span, "tool_call") for call in parsed.calls] + [(s, "thinking") for s in parsed.thinking])
    position = 0
    for span, kind in spans:
        if span.start > position:
            yield Passage("text", visible(shorten(text[position : span.start])))
        yield Passage(kind, visible(shorten(text[span.start : span.stop])))
        position = span.stop
    if position < len(text):
        yield Passage("text", visible(shorten(text[position:])))


def _outcome(turn: TurnRecord) -> tuple[tuple[str, ...], int]:
    """Kinds of the errors, and the number of retries."""
    errors = tuple(str(call.error) for call in turn.calls if call.error is not None)
    return errors, sum(call.retries for call in turn.calls)


def _kind(trajectory: Trajectory, index: int) -> str:
    return TokenKind(int(trajectory.kind[index])).name.lower()


def choose_examples(before: Mapping[str, bool], after: Mapping[str, bool], count: int) -> list[str]:
    """Problems worth reading: some that were learnt, lost, still wrong and still right, in turn.

    Args:
        before: whether the first model solved a problem, by id; empty when there is no first model.
        after: the same of the second.
        count: problems at most.

    Returns:
        Ids in the order of ``after``.
    """
    change = {key: (before.get(key, correct), correct) for key, correct in after.items() if not before or key in before}
    # Half of the places go to what was learnt; a lost problem is always shown where there is one.
    order = [(False, True), (True, False), (False, True), (False, False), (False, True), (True, True)]
    # Neighbours resemble each other in many tasks; a hash of the id takes problems from everywhere.
    mixed = sorted(change, key=lambda key: zlib.crc32(key.encode("utf-8", "replace")))
    waiting = {kind: [key for key in mixed if change[key] == kind] for kind in set(order)}
    chosen: list[str] = []
    while len(chosen) < count and any(waiting.values()):
        for kind in order:
            if waiting[kind] and len(chosen) < count:
                chosen.append(waiting[kind].pop(0))
    return [key for key in change if key in chosen]
