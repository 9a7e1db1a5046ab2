"""Token text: bytes of tokens, pieces that encode as one text, the space that some tokenizers put before text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from opd_env.formats.token_text import Piece, TokenText
from tests.formats.families import make_tokenizer

SPECIALS = ("<s>", "</s>", "<|end|>")
KINDS = ("byte-level", "no space", "space before the text", "space before every text")
TOKENIZERS = {kind: make_tokenizer(kind, "", SPECIALS, "</s>", ("\n\n\n",)) for kind in KINDS}
TEXTS = {kind: TokenText(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
every_kind = pytest.mark.parametrize("kind", KINDS)
words = st.text(max_size=10) | st.sampled_from([" ", "\n", "\n\n\n", "the", " the", "  ", "▁", "<0x41>", *SPECIALS])


@every_kind
@given(texts=st.lists(words, max_size=6))
def test_pieces_encode_as_the_tokenizer_encodes_the_whole(kind: str, texts: list[str]) -> None:
    pieces = [Piece(text) for text in texts]
    whole = TOKENIZERS[kind].encode("".join(texts), add_special_tokens=False)
    assert TEXTS[kind].encode(pieces).ids == (whole if "".join(texts) else [])


@every_kind
@given(before=words, text=words)
def test_a_text_that_continues_another_gets_no_space_of_its_own(kind: str, before: str, text: str) -> None:
    token_text = TEXTS[kind]
    before = f"<s>{before}<|end|>"
    appended = [*token_text.encode([Piece(before)]).ids, *token_text.encode([Piece(text)], after=before).ids]
    assert appended == TOKENIZERS[kind].encode(before + text, add_special_tokens=False)
    continued = token_text.encode([Piece("x", trusted=False)], after="<s>user\n").ids
    assert token_text.decode(continued).text == "x"


@every_kind
@given(text=words | st.text())
def test_untrusted_text_survives_and_holds_no_special_token(kind: str, text: str) -> None:
    encoded = TEXTS[kind].encode([Piece(text, trusted=False)], after="a")
    specials = TOKENIZERS[kind].convert_tokens_to_ids(list(SPECIALS))
    assert not set(encoded.ids) & set(specials)
    assert all(encoded.untrusted)
    decoded = TEXTS[kind].decode(encoded.ids).text
    # SentencePiece cannot tell its own mark for a space from a space; bytes written out are read as bytes.
    assert decoded == (text if kind == "byte-level" else text.replace("▁", " ")) or "<0x" in text


@every_kind
def test_only_what_is_untrusted_is_marked_so(kind: str) -> None:
    encoded = TEXTS[kind].encode([Piece("<s>a "), Piece("</s>\n\n\nb", trusted=False), Piece(" c</s>")])
    untrusted = [i for i, flag in zip(*encoded, strict=True) if flag]
    assert TEXTS[kind].decode(untrusted).text == "</s>\n\n\nb"
    assert encoded.ids[0], encoded.ids[-1] == TOKENIZERS[kind].convert_tokens_to_ids(["<s>", "</s>"])


@every_kind
@given(ids=st.lists(st.integers(-3, 500), max_size=40))
def test_every_token_has_its_bytes(kind: str, ids: list[int]) -> None:
    decoded = TEXTS[kind].decode(ids)
    assert len(decoded.byte_of_token) == len(ids) + 1
    assert decoded.byte_of_token[-1] == decoded.byte_of_char[-1]
    assert len(decoded.byte_of_char) == len(decoded.text) + 1


def test_bytes_that_make_one_character_belong_to_it() -> None:
    text = TEXTS["no space"]
    vocab = TOKENIZERS["no space"].get_vocab()
    ids = [vocab[f"<0x{byte:02X}>"] for byte in "€".encode()]
    assert text.decode(ids).text == "€"
    assert text.decode(ids[:2]).text == "\ufffd\ufffd"


def test_a_tokenizer_that_spells_no_bytes_is_refused() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"decodes with \['WordPiece'\]"):
        TokenText(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_length_limits_of_the_tokenizer_do_not_cut_text() -> None:
    tokenizer: Any = make_tokenizer("byte-level", "", SPECIALS, "</s>")
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["truncation"] is not None
    assert len(TokenText(tokenizer).encode([Piece("0123456789")]).ids) == 10
