"""Small faults of a call that can be put right without guessing its meaning. Off by default, and always listed.

Worked example::

    get_format(tokenizer, repair=True).parse(ids).calls[0].repairs      # ('single quotes', 'trailing comma')

==========================  ==============================================================
code fence                  the block is wrapped in a fence of three backticks
single quotes               strings in single quotes, as Python writes them
Python constants            ``True``, ``False``, ``None``
trailing comma              a comma before a closing bracket
missing brackets            closing brackets are missing at the end of a complete block
dotted name                 ``functions.search`` for ``search``
arguments as a string       the arguments are a JSON text in a JSON string
text after the call         (Llama) text follows a call that should be the whole turn
==========================  ==============================================================

Test it alone: ``pytest tests/formats/test_repairs.py``
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
_PIECE = re.compile(r""""(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|[A-Za-z_]+|[^"'A-Za-z_]+""", re.DOTALL)
_TRAILING_COMMA = re.compile(r",(\s*)(?=[}\]])")
_PAIRS = {"{": "}", "[": "]"}
_LONGEST = 20_000  # characters; a longer block is not worth repairing


def repair_name(name: str, repairs: list[str]) -> str:
    """The last part of a dotted name; noted in ``repairs``."""
    last = name.rsplit(".", 1)[-1]
    if last == name or not last:
        return name
    repairs.append("dotted name")
    return last


def repair_json(text: str) -> Iterator[tuple[str, list[str]]]:
    """Texts that may be the JSON that was meant, with the names of the repairs, fewest first.

    Every repair keeps what stands inside strings as it is. Whether a candidate is JSON is for the caller to see.
    """
    if len(text) > _LONGEST:
        return
    names: list[str] = []
    inner = _inside_fence(text.strip())
    if inner is not None:
        text = inner
        names = [*names, "code fence"]
        yield text, names
    pieces = _PIECE.findall(text)
    if any(piece[0] == "'" for piece in pieces):
        pieces = [_double_quoted(piece) if piece[0] == "'" else piece for piece in pieces]
        names = [*names, "single quotes"]
        yield "".join(pieces), names
    if any(piece in _CONSTANTS for piece in pieces):
        pieces = [_CONSTANTS.get(piece, piece) for piece in pieces]
        names = [*names, "Python constants"]
        yield "".join(pieces), names
    without_commas = _outside_strings(pieces)
    if without_commas != pieces:
        pieces = without_commas
        names = [*names, "trailing comma"]
        yield "".join(pieces), names
    if missing := _missing_brackets(pieces):
        yield "".join(pieces) + missing, [*names, "missing brackets"]


def _inside_fence(text: str) -> str | None:
    if len(text) < 6 or not (text.startswith("```") and text.endswith("```")):
        return None
    language, line_end, code = text[3:-3].partition("\n")
    return code if line_end and (not language.strip() or language.strip().isalpha()) else text[3:-3]


def _double_quoted(piece: str) -> str:
    """A string in single quotes as JSON writes it. One that is not closed becomes something that is not JSON."""
    inner = piece[1:-1].replace("\\'", "'")
    return '"' + re.sub(r'(?<!\\)"', '\\"', inner) + '"'


def _outside_strings(pieces: list[str]) -> list[str]:
    """The pieces without commas before closing brackets. A piece outside strings holds all of ``, }``."""
    return [piece if piece[0] == '"' else _TRAILING_COMMA.sub(r"\1", piece) for piece in pieces]


def _missing_brackets(pieces: list[str]) -> str:
    """The closing brackets that the text lacks at its end; empty when brackets do not match otherwise."""
    expected: list[str] = []
    for piece in pieces:
        for char in "" if piece[0] == '"' else piece:
            if char in _PAIRS:
                expected.append(_PAIRS[char])
            elif char in "}]" and (not expected or expected.pop() != char):
                return ""
    return "".join(reversed(expected))
