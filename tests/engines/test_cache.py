"""The slots against plain lists: what is shared, copied, exchanged and kept when the storage grows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_env.engines.cache import SlotCache
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
MODEL = tiny_llama(vocab_size=64).eval()
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=200)


def feed(cache: SlotCache, first: int, new: list[list[int]]) -> None:
    """One forward over slots from ``first`` on."""
    cache.reserve(first + len(new), 1)
    window = cache.window(first, first + len(new), new, CPU)
    with torch.no_grad():
        MODEL.model(
            input_ids=window.ids_NQ,
            position_ids=window.positions_NQ,
            attention_mask=window.mask(torch.float32),
            past_key_values=cache,
            use_cache=True,
        )


def holds(cache: SlotCache, slot: int, tokens: list[int]) -> None:
    """Checks a slot's tokens, and its keys and values against those of a forward of its own."""
    assert int(cache.lengths[slot]) == len(tokens)
    assert cache.shared(slot, slot + 1, [*tokens, 63]).tolist() == [len(tokens)]
    if tokens:
        alone = MODEL.model(torch.tensor([tokens]), use_cache=True).past_key_values
        for layer, expected in zip(cache.layers, alone.layers, strict=True):
            torch.testing.assert_close(layer.keys[slot, :, : len(tokens)], expected.keys[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(layer.values[slot, :, : len(tokens)], expected.values[0], atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.data())
@torch.no_grad()
def test_slots_hold_what_a_forward_of_their_own_tokens_gives(data: st.DataObject) -> None:
    cache = SlotCache(MODEL.config.num_hidden_layers)
    slots: list[list[int]] = data.draw(st.lists(TOKENS, min_size=2, max_size=4))
    feed(cache, 0, slots)
    for _ in range(data.draw(st.integers(1, 5))):
        a, b = data.draw(st.permutations(range(len(slots))))[:2]
        match data.draw(st.sampled_from(["feed", "swap", "copy", "forget", "new"])):
            case "feed":
                new = data.draw(TOKENS)
                feed(cache, a, [new])
                slots[a] = slots[a] + new
            case "swap":
                cache.swap(a, b)
                slots[a], slots[b] = slots[b], slots[a]
            case "copy":
                length = data.draw(st.integers(0, len(slots[a])))
                cache.copy(a, b, length)
                slots[b] = slots[a][:length]
            case "forget":
                cache.lengths[a] = data.draw(st.integers(0, len(slots[a])))
                slots[a] = slots[a][: cache.lengths[a]]
            case "new":
                slots.append(data.draw(TOKENS))
                feed(cache, len(slots) - 1, [slots[-1]])
    for slot, tokens in enumerate(slots):
        holds(cache, slot, tokens)


@given(st.lists(TOKENS, min_size=1, max_size=5), TOKENS, st.data())
@torch.no_grad()
def test_shared_counts_the_tokens_that_both_begin_with(
    slots: list[list[int]], prefix: list[int], data: st.DataObject
) -> None:
    prefix = data.draw(st.sampled_from(slots))[: data.draw(st.integers(0, 200))] + prefix
    cache = SlotCache(0)
    cache.reserve(len(slots), 1)
    cache.window(0, len(slots), slots, CPU)
    expected = []
    for tokens in slots:
        count = 0
        while count < min(len(tokens), len(prefix)) and tokens[count] == prefix[count]:
            count += 1
        expected.append(count)
    assert cache.shared(0, len(slots), prefix).tolist() == expected


def test_the_mask_shows_a_token_itself_and_what_stands_before() -> None:
    cache = SlotCache(0)
    cache.reserve(2, 1)
    cache.window(0, 1, [[5, 6]], CPU)
    window = cache.window(0, 2, [[7], [8, 9]], CPU)
    assert window.ids_NQ.tolist() == [[7, 0], [8, 9]]
    assert window.positions_NQ.tolist() == [[2, 3], [0, 1]]
    seen = [[[[1, 1, 1, 0], [1, 1, 1, 1]]], [[[1, 0, 0, 0], [1, 1, 0, 0]]]]
    assert (window.mask(torch.float32) == 0).int().tolist() == seen
    assert window.mask(torch.float32).min() == torch.finfo(torch.float32).min


def test_a_forward_without_a_window_is_refused() -> None:
    with pytest.raises(RuntimeError, match="without a window"):
        MODEL.model(torch.tensor([[1]]), past_key_values=SlotCache(MODEL.config.num_hidden_layers), use_cache=True)
