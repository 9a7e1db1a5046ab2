"""Keys and values of many episodes, one row (slot) each, beside the tokens that they are of.

Worked example::

    cache = SlotCache(layers=3)
    cache.grow(2, 40)
    with_positions = cache.window(0, 2, new)       # the next forward writes new tokens to slots 0 and 1
    decoder(..., past_key_values=cache, ...)
    cache.shared(0, 2, prefix)                     # how many of the first tokens of a prefix each slot holds
    cache.copy(0, 1, 30)                           # slot 1 begins with the 30 tokens that slot 0 begins with

A key and a value depend on nothing but the tokens up to theirs, so that what one slot holds serves every slot whose
tokens begin alike. The cache forgets nothing by itself and knows nothing of weights: who changes them empties it.

Test it alone: ``pytest tests/engines/test_cache.py``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_GROW = 128  # the cache grows by multiples of this many positions


@dataclass(frozen=True)
class Window:
    """What the next forward reads and writes: its slots, and what it feeds to each."""

    first: int
    last: int
    ids_NQ: torch.Tensor
    """New tokens, padded on the right: what is written there is masked, and overwritten by later tokens."""
    positions_NQ: torch.Tensor
    length: int
    """Positions that any of the slots then holds, padding included."""

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """What the attention adds to its scores, ``[N, 1, Q, length]``: a token sees itself and what stands before."""
        hidden_NQT = torch.arange(self.length, device=self.positions_NQ.device) > self.positions_NQ[..., None]
        zeros = torch.zeros(hidden_NQT.shape, dtype=dtype, device=hidden_NQT.device)
        return zeros.masked_fill_(hidden_NQT, torch.finfo(dtype).min)[:, None]


class SlotCache(Cache):  # type: ignore[misc]  # transformers has no types
    """What slots hold. Slots exist up to the largest that ``reserve`` was called with; ``lengths`` are in use.

    Args:
        layers: of the model.
    """

    def __init__(self, layers: int) -> None:
        self._layers = [_SlotLayer() for _ in range(layers)]
        super().__init__(layers=self._layers)
        self._tokens = np.zeros((0, 0), dtype=np.int64)
        self.lengths = np.zeros(0, dtype=np.int64)
        """Tokens of each slot whose keys and values are stored; lower one to forget the last of them."""

    def reserve(self, slots: int, length: int) -> None:
        """Grows to at least this size, keeping what is held."""
        old_slots, old_length = self._tokens.shape
        if old_slots < slots or old_length < length:
            slots, length = max(slots, old_slots), max(-(-length // _GROW) * _GROW, old_length)
            self._tokens = np.pad(self._tokens, ((0, slots - old_slots), (0, length - old_length)))
            self.lengths = np.pad(self.lengths, (0, slots - old_slots))
            for layer in self._layers:
                layer.reserve(slots, length)

    def window(self, first: int, last: int, new: Sequence[Sequence[int]], device: torch.device) -> Window:
        """Adds new tokens to the slots of a range; the next forward must be fed what it returns."""
        before_N = self.lengths[first:last].copy()
        counts = [len(tokens) for tokens in new]
        width = max(counts)
        length = int(before_N.max()) + width
        self.reserve(last, length)
        ids_NQ = np.array([[*tokens, *[0] * (width - len(tokens))] for tokens in new])
        positions_NQ = before_N[:, None] + np.arange(width)
        self._tokens[np.arange(first, last)[:, None], positions_NQ] = ids_NQ
        self.lengths[first:last] += counts
        window = Window(
            first, last, torch.from_numpy(ids_NQ).to(device), torch.from_numpy(positions_NQ).to(device), length
        )
        for layer in self._layers:
            layer.window = window
        return window

    def shared(self, first: int, last: int, prefix: Sequence[int] | np.ndarray) -> np.ndarray:
        """How many tokens at the beginning of a prefix each slot of a range holds, ``[last - first]``."""
        width = min(len(prefix), self._tokens.shape[1])
        differs = self._tokens[first:last, :width] != np.asarray(prefix[:width])
        return np.minimum(np.where(differs.any(axis=1), differs.argmax(axis=1), width), self.lengths[first:last])

    def copy(self, source: int, target: int, length: int) -> None:
        """Lets ``target`` hold the first ``length`` tokens of ``source``, and nothing else."""
        self._tokens[target, :length] = self._tokens[source, :length]
        self.lengths[target] = length
        for layer in self._layers:
            layer.copy(source, target, length)

    def swap(self, a: int, b: int) -> None:
        """Exchanges two slots."""
        lengths = int(self.lengths[a]), int(self.lengths[b])
        longest = max(lengths)
        self._tokens[[a, b], :longest] = self._tokens[[b, a], :longest]
        self.lengths[[a, b]] = self.lengths[[b, a]]
        for layer in self._layers:
            layer.swap(a, b, *lengths)


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values, shape ``[slots, heads, positions, size]``."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.size = (0, 0)
        self.window: Window | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Storage, now that heads and their size are known."""
        slots, length = self.size
        self.keys, self.values = (
            states.new_zeros(slots, states.shape[1], length, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def reserve(self, slots: int, length: int) -> None:
        self.size = slots, length
        if self.is_initialized:
            for name in ("keys", "values"):
                old: torch.Tensor = getattr(self, name)
                grown = old.new_zeros(slots, old.shape[1], length, old.shape[3])
                grown[: old.shape[0], :, : old.shape[2]] = old
                setattr(self, name, grown)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new positions of the window's slots; returns all their positions so far."""
        window = self.window
        if window is None:
            raise RuntimeError("a forward without a window: call SlotCache.window before it")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys[window.first : window.last], self.values[window.first : window.last]
        index = window.positions_NQ[:, None, :, None]
        keys.scatter_(2, index.expand_as(key_states), key_states)
        values.scatter_(2, index.expand_as(value_states), value_states)
        return keys[:, :, : window.length], values[:, :, : window.length]

    def copy(self, source: int, target: int, length: int) -> None:
        for store in (self.keys, self.values):
            store[target, :, :length] = store[source, :, :length]

    def swap(self, a: int, b: int, length_a: int, length_b: int) -> None:
        """Exchanges the positions of two slots that are in use; of an empty one nothing moves."""
        if not length_a:
            a, b, length_a, length_b = b, a, length_b, length_a
        if not length_a:
            return
        for store in (self.keys, self.values):
            kept = store[b, :, :length_b].clone()
            store[b, :, :length_a] = store[a, :, :length_a]
            if length_b:
                store[a, :, :length_b] = kept

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return 0 if self.window is None else self.window.length, 0

    def get_seq_length(self) -> int:
        """Positions before this forward; not used, since positions are always passed."""
        return 0

    def get_max_length(self) -> int:
        return -1
