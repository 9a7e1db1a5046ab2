"""Text to token ids and back, without losing track of which bytes a token stands for.

``TokenText.encode`` takes text in pieces and lets special tokens be recognised only in those that the kit wrote
itself: a web page that contains ``<|im_end|>`` stays text. ``TokenText.decode`` gives the text of any token
sequence, and for any character range the tokens that cover it.

Two kinds of tokenizers are supported, told apart by how they spell bytes: byte-level BPE (GPT-2, Llama 3, Qwen,
SmolLM, Mistral since 2024) and SentencePiece with byte fallback (Gemma, Llama 2, older Mistral). The second kind may
put a space before a text; here that is done only where a whole encode of the conversation would do it.

Test it alone: ``pytest tests/formats/test_token_text.py``
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from opd_env.formats.parse import Span


class Piece(NamedTuple):
    """A stretch of text to encode."""

    text: str
    trusted: bool = True
    """Written by the kit or the template: special tokens in it are special. False: everything is plain text."""


class Encoded(NamedTuple):
    """Token ids, and which of them hold text of untrusted pieces."""

    ids: list[int]
    untrusted: list[bool]


@dataclass(frozen=True)
class Decoded:
    """The text of a token sequence. Bytes that are not UTF-8 become U+FFFD, one for each byte."""

    chunks: list[bytes]
    """What each token stands for."""

    @cached_property
    def text(self) -> str:
        """All of it."""
        return self._escaped if self._escaped.isascii() else _BROKEN.sub("\ufffd", self._escaped)

    @cached_property
    def _escaped(self) -> str:
        """The text with a lone surrogate for each byte that is not UTF-8."""
        return b"".join(self.chunks).decode("utf-8", "surrogateescape")

    def tokens_of(self, span: Span) -> Span:
        """The smallest range of tokens that covers a non-empty range of characters."""
        first, last = span.start, span.stop - 1
        if not self._escaped.isascii():
            first, last = int(self.byte_of_char[span.start]), int(self.byte_of_char[span.stop]) - 1
        return Span(bisect_right(self._token_starts, first) - 1, bisect_right(self._token_starts, last))

    @cached_property
    def byte_of_char(self) -> NDArray[np.int64]:
        """Byte offset of every character, and of the end; shape ``[len(text) + 1]``."""
        codes = np.frombuffer(self._escaped.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        widths[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1
        return np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)

    @cached_property
    def byte_of_token(self) -> NDArray[np.int64]:
        """Byte offset of every token, and of the end; shape ``[tokens + 1]``."""
        return np.array(self._token_starts, dtype=np.int64)

    @cached_property
    def _token_starts(self) -> list[int]:
        return list(accumulate(map(len, self.chunks), initial=0))


class _Prefix(StrEnum):
    """Where a tokenizer puts a space before text."""

    NEVER = "never"
    FIRST = "first"
    """At the start of a text."""
    ALWAYS = "always"
    """There, and after every special token."""


class TokenText:
    """Encodes and decodes with one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer, byte-level BPE or SentencePiece with byte fallback.

    Raises:
        ValueError: the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: Any) -> None:
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        kinds = [step["type"] for step in _steps(spec["decoder"])]
        if "ByteLevel" in kinds:
            self._spelling = _spelled_byte_level
        elif "ByteFallback" in kinds:
            self._spelling = _spelled_byte_fallback
        else:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} decodes with {kinds}; supported are byte-level BPE (GPT-2, "
                "Llama 3, Qwen, SmolLM families) and SentencePiece with byte fallback (Gemma, Llama 2, Mistral)"
            )
        self._special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        # Gemma has runs of line ends as added tokens. They are text, wherever they come from.
        self._space_pattern = any_of(token for token in self._special if not token.strip())
        self._markup_pattern = any_of(token for token in self._special if token.strip())
        self._hidden_pattern = any_of([*(token for token in self._special if token.strip()), _MARK])
        self._prefix, self._prefix_once = _take_prefix(spec)
        spec |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._plain = Tokenizer.from_str(json.dumps(spec))
        self._bytes: dict[int, bytes] = {index: text.encode() for text, index in self._special.items()}

    @property
    def markup(self) -> dict[str, int]:
        """Added tokens and their ids, but for runs of white space."""
        return {text: index for text, index in self._special.items() if text.strip()}

    def holds_special(self, text: str) -> bool:
        """Whether the text would be read as special tokens by an ordinary encode."""
        return self._markup_pattern.search(text) is not None

    def hide(self, text: str) -> str:
        """The text with a mark for each text of a special token: a template passes marks on, and ``revealed`` tells
        what was hidden from what the template wrote."""
        return self._hidden_pattern.sub(lambda match: f"{_MARK}{self._special.get(match.group(), '')}\ue001", text)

    def revealed(self, text: str) -> list[Piece]:
        """A template's text in pieces: what ``hide`` had taken out is plain text."""
        names = {str(index): token for token, index in self._special.items()} | {"": _MARK}
        pieces = re.split(f"{_MARK}(\\d*)\ue001", text)
        return [Piece(names[one], trusted=False) if number % 2 else Piece(one) for number, one in enumerate(pieces)]

    def encode(self, pieces: Sequence[Piece], after: str = "") -> Encoded:
        """Encodes the pieces as one text: tokens may span pieces, as they would in a chat template's output.

        Args:
            pieces: the text.
            after: what precedes it in the conversation (its last special token and what follows is enough); empty
                when nothing does.
        """
        encoded = Encoded([], [])
        stretch = ""  # text between special tokens
        untrusted: list[bool] = []  # for every character of it
        first = not after  # no text stands anywhere before; fresh: none directly before
        fresh = first or any(match.end() == len(after) for match in self._markup_pattern.finditer(after))

        def flush() -> None:
            nonlocal stretch
            position = 0
            for match in self._space_pattern.finditer(stretch):
                add(position, match.start())
                add_special(match.group(), any(untrusted[match.start() : match.end()]))
                position = match.end()
            add(position, len(stretch))
            stretch = ""
            untrusted.clear()

        def add(start: int, stop: int) -> None:
            nonlocal first, fresh
            if start == stop:
                return
            text, flags = stretch[start:stop], untrusted[start:stop]
            prefix = fresh and (self._prefix is _Prefix.ALWAYS or (self._prefix is _Prefix.FIRST and first))
            if prefix and not (self._prefix_once and text[0] in " \u2581"):
                text, flags = f" {text}", [False, *flags]
            encoding = self._plain.encode(text, add_special_tokens=False)
            encoded.ids.extend(encoding.ids)
            encoded.untrusted.extend(any(flags[begin:end]) for begin, end in encoding.offsets)
            first = fresh = False

        def add_special(text: str, foreign: bool) -> None:
            nonlocal first, fresh
            encoded.ids.append(self._special[text])
            encoded.untrusted.append(foreign)
            first, fresh = False, True

        for text, trusted in pieces:
            position = 0
            for match in self._markup_pattern.finditer(text) if trusted else ():
                stretch += text[position : match.start()]
                untrusted += [False] * (match.start() - position)
                flush()
                add_special(match.group(), False)
                position = match.end()
            stretch += text[position:]
            untrusted += [not trusted] * (len(text) - position)
        flush()
        return encoded

    def decode(self, ids: Sequence[int]) -> Decoded:
        """The text of any ids, special tokens written out; ids outside the vocabulary become U+FFFD."""
        known = self._bytes
        return Decoded([known[index] if index in known else self._token_bytes(index) for index in ids])

    def _token_bytes(self, index: int) -> bytes:
        token = self._plain.id_to_token(index) if 0 <= index < 1 << 31 else None
        spelled = None if token is None else self._spelling(token)
        found = self._bytes[index] = b"\xff" if spelled is None else spelled
        return found


_MARK = "\ue000"
"""A private-use character, which no template writes."""
_BROKEN = re.compile("[\udc80-\udcff]")


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing when there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _steps(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer, sequences unfolded."""
    if component is None or component["type"] != "Sequence":
        return [] if component is None else [component]
    inner = next(value for value in component.values() if isinstance(value, list))
    return [step for one in inner for step in _steps(one)]


def _take_prefix(spec: dict[str, Any]) -> tuple[_Prefix, bool]:
    """Takes the rule for spaces before text out of a tokenizer's specification.

    Returns:
        The rule, and whether a text that begins with a space gets no other.
    """
    normalizers = _steps(spec["normalizer"])
    others = [step for step in normalizers if step["type"] != "Prepend"]
    if len(others) < len(normalizers):
        spec["normalizer"] = {"type": "Sequence", "normalizers": others}
        return _Prefix.ALWAYS, False
    for step in _steps(spec["pre_tokenizer"]):
        if step["type"] == "Metaspace":
            scheme, step["prepend_scheme"] = step.get("prepend_scheme", "always"), "never"
            return _Prefix(scheme), True
        if step["type"] == "ByteLevel" and step["add_prefix_space"]:
            step["add_prefix_space"] = False
            return _Prefix.ALWAYS, True
    return _Prefix.NEVER, False


def _spelled_byte_level(token: str) -> bytes | None:
    return bytes(map(_BYTE_OF_CHAR.__getitem__, token)) if all(char in _BYTE_OF_CHAR for char in token) else None


def _spelled_byte_fallback(token: str) -> bytes | None:
    byte = _FALLBACK_BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


_FALLBACK_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_of_char() -> dict[str, int]:
    """Inverse of GPT-2's map from bytes to printable characters (``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + offset): byte for offset, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR = _byte_of_char()
