"""Text to token ids and back, without losing track of which bytes a token stands for.

``TokenText.encode`` takes text in pieces and lets special tokens be recognised only in those that the kit wrote
itself: a web page that contains ``<|im_end|>`` stays text. ``TokenText.decode`` gives the text of any token
sequence, and for any character range the tokens that cover it.

Test it alone: ``pytest tests/core/test_formats.py``
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
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

    text: str
    byte_of_char: NDArray[np.int64]
    """Byte offset of every character, and of the end; shape ``[len(text) + 1]``."""
    byte_of_token: NDArray[np.int64]
    """Byte offset of every token, and of the end; shape ``[tokens + 1]``."""

    def tokens_of(self, span: Span) -> Span:
        """The smallest range of tokens that covers a non-empty range of characters."""
        first_byte, last_byte = self.byte_of_char[span.start], self.byte_of_char[span.stop] - 1
        first = int(np.searchsorted(self.byte_of_token, first_byte, side="right")) - 1
        last = int(np.searchsorted(self.byte_of_token, last_byte, side="right")) - 1
        return Span(first, last + 1)


class TokenText:
    """Encodes and decodes with one byte-level tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer with byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM families).

    Raises:
        ValueError: the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: Any) -> None:
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        if (spec.get("decoder") or {}).get("type") != "ByteLevel":
            kind = (spec.get("decoder") or {}).get("type")
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} decodes with {kind!r}; only byte-level BPE tokenizers are "
                "supported so far (GPT-2, Llama 3, Qwen and SmolLM families)"
            )
        self._special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        spec["added_tokens"], spec["post_processor"] = [], None
        self._plain = Tokenizer.from_str(json.dumps(spec))
        self._bytes: dict[int, bytes] = {index: text.encode() for text, index in self._special.items()}

    def special_id(self, text: str) -> int | None:
        """Id of an added token such as ``<|im_end|>``; None when the tokenizer has none of that text."""
        return self._special.get(text)

    def holds_special(self, text: str) -> bool:
        """Whether the text would be read as special tokens by an ordinary encode."""
        return self._special_pattern.search(text) is not None

    def encode(self, pieces: Sequence[Piece]) -> Encoded:
        """Encodes the pieces as one text: tokens may span pieces, as they would in a chat template's output."""
        encoded = Encoded([], [])
        stretch = ""  # text between special tokens
        untrusted: list[bool] = []  # for every character of it

        def flush() -> None:
            nonlocal stretch
            encoding = self._plain.encode(stretch, add_special_tokens=False)
            encoded.ids.extend(encoding.ids)
            encoded.untrusted.extend(any(untrusted[start:stop]) for start, stop in encoding.offsets)
            stretch = ""
            untrusted.clear()

        for text, trusted in pieces:
            position = 0
            if trusted:
                for match in self._special_pattern.finditer(text):
                    stretch += text[position : match.start()]
                    untrusted += [False] * (match.start() - position)
                    flush()
                    encoded.ids.append(self._special[match.group()])
                    encoded.untrusted.append(False)
                    position = match.end()
            stretch += text[position:]
            untrusted += [not trusted] * (len(text) - position)
        flush()
        return encoded

    def decode(self, ids: Sequence[int]) -> Decoded:
        """The text of any ids, special tokens written out; ids outside the vocabulary become U+FFFD."""
        chunks = [self._token_bytes(index) for index in ids]
        data = b"".join(chunks)
        escaped = data.decode("utf-8", "surrogateescape")
        codes = np.frombuffer(escaped.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        broken = (codes >= 0xDC80) & (codes <= 0xDCFF)
        widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        widths[broken] = 1
        return Decoded(
            text=re.sub("[\udc80-\udcff]", "\ufffd", escaped) if broken.any() else escaped,
            byte_of_char=np.concatenate([[0], np.cumsum(widths)]).astype(np.int64),
            byte_of_token=np.concatenate([[0], np.cumsum([len(chunk) for chunk in chunks])]).astype(np.int64),
        )

    def _token_bytes(self, index: int) -> bytes:
        if index not in self._bytes:
            token = self._plain.id_to_token(index) if 0 <= index < 1 << 31 else None
            known = token is not None and all(char in _BYTE_OF_CHAR for char in token)
            self._bytes[index] = bytes(_BYTE_OF_CHAR[char] for char in token or "") if known else b"\xff"
        return self._bytes[index]


def _byte_of_char() -> dict[str, int]:
    """Inverse of GPT-2's map from bytes to printable characters (``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + offset): byte for offset, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR = _byte_of_char()
