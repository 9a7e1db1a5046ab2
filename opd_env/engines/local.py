"""Samples with a transformers model in this process: continuous batching over slots with a kept KV cache.

Every open episode owns one row (slot) of a preallocated cache. Rows ``0 … n-1`` are running, so that one decode
step is one forward over a view, without copying. A turn that ends parks its row behind them; the next turn of the
episode only prefills what is new (the tool results). Nothing is padded on the left and nothing waits for the
slowest episode.

What episodes have in common at their beginning (the tools, a system prompt, the question of further samples) is
prefilled once and copied, as long as one of them is open.

Every turn draws its random numbers from its own seed: what an episode samples does not depend on its neighbours,
up to floating-point noise of the batch size.

Not supported: models with state-space layers, contexts beyond a sliding window.

Test it alone: ``pytest tests/engines/test_local.py tests/engines/test_sampling.py``
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from opd_env.engines.base import Completion, Engine, Request, SamplingParams
from opd_env.engines.cache import SlotCache
from opd_env.engines.models import split_model

_PREFILL_TOKENS = 8192
"""Of one prefill forward, padding included: bounds its memory."""
_FORWARD_TOKENS = 128
"""A forward more is worth what it costs if it saves this many tokens, of padding or of a common beginning."""


@dataclass
class _Row:
    """What a slot's episode is doing."""

    episode: int
    slot: int
    request: Request | None = None
    """The turn under way."""
    prefix_T: Any = None
    """Its prefix as an array."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    uniforms: Any = None

    @property
    def turn(self) -> Request:
        """The turn under way."""
        if self.request is None:
            raise RuntimeError(f"episode {self.episode} has no turn under way")
        return self.request


class LocalEngine(Engine):
    """Samples with a model that lives here; its weights may change between turns of different episodes.

    Args:
        model: a causal language model, or a PEFT wrapper of one.
        stop_token_ids: any of these ends a turn; a format's ``stop_token_ids``.
        vocab_size: ids beyond it (padding of the head) are never sampled; a format's ``vocab_size``.
        capacity: turns that are sampled side by side. Memory grows with it times the longest episode; with as much
            again while episodes wait for tools.
        own_weights: sample with a copy, which changes in ``update_weights`` only, so that the model can be trained
            meanwhile. It takes as much memory as the weights that are trained; frozen ones are shared.
    """

    def __init__(
        self,
        model: Any,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        capacity: int = 64,
        *,
        own_weights: bool = False,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}; an engine needs at least one slot")
        self.capacity = 2 * capacity
        self._side_by_side = capacity
        if own_weights:
            frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
            model = copy.deepcopy(model, frozen)
        self._model = model
        self._decoder, self._head = split_model(model)
        config = model.config.get_text_config()
        window = config.sliding_window if "sliding_attention" in (getattr(config, "layer_types", None) or ()) else None
        self.max_context = min(config.max_position_embeddings, window or config.max_position_embeddings)
        self._vocab_size = vocab_size
        self._stop = frozenset(stop_token_ids)
        self._cache = SlotCache(config.num_hidden_layers)
        self._rows: list[_Row] = []
        self._running = 0  # rows[:running] have a turn under way
        self._queue: deque[Request] = deque()
        self._cut: set[int] = set()

    def submit(self, request: Request) -> None:
        length = len(request.token_ids)
        if not length:
            raise ValueError(f"episode {request.episode}: the prefix is empty")
        if length + request.params.max_tokens > self.max_context:
            raise ValueError(
                f"episode {request.episode}: {length} tokens and max_tokens={request.params.max_tokens} exceed the "
                f"model's context of {self.max_context}; lower max_tokens or max_turn_tokens"
            )
        self._queue.append(request)

    @property
    def side_by_side(self) -> int:
        return self._side_by_side

    @property
    def busy(self) -> bool:
        return bool(self._queue) or self._running > 0

    def cut(self, episode: int) -> None:
        """The next step ends the turn."""
        self._cut.add(episode)

    @torch.no_grad()
    def update_weights(self, model: Any) -> None:
        if model is self._model:
            return
        if self.busy or self._rows:
            raise RuntimeError("weights cannot change while episodes are open")
        own = dict(self._model.named_parameters())
        for name, weight in model.named_parameters():
            own[name].copy_(weight)

    def release(self, episode: int) -> None:
        self._cut.discard(episode)
        self._queue = deque(request for request in self._queue if request.episode != episode)
        for row in self._rows:
            if row.episode == episode:
                self._cache.lengths[row.slot] = 0
                if row.slot < self._running:
                    self._running -= 1
                    self._swap(row.slot, self._running)
                self._swap(row.slot, len(self._rows) - 1)
                self._rows.pop()
                return

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """Prefills queued turns, then decodes one token for every running one."""
        training = self._model.training
        if training:
            self._model.eval()
        try:
            self._admit()
            ended = self._retire()
            if self._running:
                self._forward(0, [[row.ids[-1]] for row in self._rows[: self._running]])
                ended += self._retire()
            return ended
        finally:
            if training:
                self._model.train()

    def _admit(self) -> None:
        """Gives queued turns a slot and prefills them, several at a time."""
        rows = sorted(self._seat(), key=lambda row: list(row.turn.token_ids))
        while rows:
            now, rows = self._divide(rows)
            for row in now:
                slot, held = self._source(row)
                if slot == row.slot:
                    self._cache.lengths[slot] = held
                else:
                    self._cache.copy(slot, row.slot, held)
            for group in self._groups(now):
                first, self._running = self._running, self._running + len(group)
                for slot, row in enumerate(group, first):
                    self._swap(row.slot, slot)
                self._forward(first, [row.prefix_T[self._cache.lengths[row.slot] :].tolist() for row in group])

    def _seat(self) -> list[_Row]:
        """The rows of the queued turns, as far as there are slots."""
        owners = {row.episode: row for row in self._rows}
        seated, waiting = [], deque[Request]()
        for request in self._queue:
            row = owners.get(request.episode)
            if row is None and len(self._rows) >= self.capacity:
                waiting.append(request)
                continue
            if row is None:
                row = owners[request.episode] = _Row(request.episode, len(self._rows))
                self._rows.append(row)
            elif row.request is not None:
                raise RuntimeError(f"episode {request.episode} has a turn under way already")
            row.request, row.prefix_T = request, np.asarray(request.token_ids)
            row.uniforms = np.random.default_rng(request.seed % (1 << 64)).random(request.params.max_tokens)
            seated.append(row)
        self._queue = waiting
        self._cache.reserve(len(self._rows), 1)
        return seated

    def _source(self, row: _Row) -> tuple[int, int]:
        """The slot that holds most of a prefix, if possible the row's own, and how much; the last token is left out."""
        held = np.minimum(self._cache.shared(0, len(self._rows), row.prefix_T), len(row.prefix_T) - 1)
        most = int(held.max())
        return (row.slot if held[row.slot] == most else int(held.argmax())), most

    def _divide(self, rows: list[_Row]) -> tuple[list[_Row], list[_Row]]:
        """Which rows to prefill now, and which when those have put into the cache what both begin with.

        Args:
            rows: ordered by their prefixes, so that a row shares most with those next to it.
        """
        now, later, saved = [rows[0]], list[_Row](), 0
        common = len(rows[0].prefix_T)  # of the row and the last one of ``now``
        for before, row in pairwise(rows):
            common = min(common, _common(before.prefix_T, row.prefix_T))
            gain = min(common, len(row.prefix_T) - 1) - self._source(row)[1]
            if gain > 0:
                later.append(row)
                saved += gain
            else:
                now.append(row)
                common = len(row.prefix_T)
        return (now, later) if saved >= _FORWARD_TOKENS else (rows, [])

    def _groups(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Rows to prefill in one forward: of like length, and no more than fit into its memory."""
        group: list[_Row] = []
        padding = width = 0
        for row in sorted(rows, key=lambda row: len(row.prefix_T) - self._cache.lengths[row.slot]):
            before, width = width, len(row.prefix_T) - int(self._cache.lengths[row.slot])
            padding += len(group) * (width - before)
            if group and (padding > _FORWARD_TOKENS or (len(group) + 1) * width > _PREFILL_TOKENS):
                yield group
                group, padding = [], 0
            group.append(row)
        yield group

    def _forward(self, first: int, new: list[list[int]]) -> None:
        """Feeds the rows from ``first`` on their new tokens and samples the token that follows."""
        rows = self._rows[first : first + len(new)]
        weight = next(self._decoder.parameters())
        window = self._cache.window(first, first + len(new), new, weight.device)
        hidden_NQH = self._decoder(
            input_ids=window.ids_NQ,
            # Padding may lie beyond the context.
            position_ids=window.positions_NQ.clamp(max=self.max_context - 1),
            attention_mask=window.mask(weight.dtype),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        ends_N = torch.tensor([len(tokens) - 1 for tokens in new], device=weight.device)
        hidden_NH = hidden_NQH[torch.arange(len(rows), device=weight.device), ends_N]
        logits_NV = self._head(hidden_NH)[:, : self._vocab_size].float()
        chosen_N, logprobs_N = draw_tokens(
            logits_NV, [row.turn.params for row in rows], [row.uniforms[len(row.ids)] for row in rows]
        )
        for row, token, logprob in zip(rows, chosen_N.tolist(), logprobs_N.tolist(), strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)

    def _retire(self) -> list[Completion]:
        """Parks the rows whose turn ended."""
        completions = []
        for row in self._rows[: self._running][::-1]:
            stopped = row.ids[-1] in self._stop
            if stopped or len(row.ids) >= row.turn.params.max_tokens or row.episode in self._cut:
                self._cut.discard(row.episode)
                completions.append(Completion(row.episode, row.ids, row.logprobs, truncated=not stopped))
                row.request, row.ids, row.logprobs = None, [], []
                self._running -= 1
                self._swap(row.slot, self._running)
        return completions[::-1]

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self._cache.swap(a, b)
            self._rows[a], self._rows[b] = self._rows[b], self._rows[a]
            self._rows[a].slot, self._rows[b].slot = a, b


def _common(a_T: np.ndarray, b_T: np.ndarray) -> int:
    """Tokens that both begin with."""
    width = min(len(a_T), len(b_T))
    differs_T = a_T[:width] != b_T[:width]
    return int(differs_T.argmax()) if differs_T.any() else width


def draw_tokens(
    logits_NV: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws by inverting the distribution function, in float64, at a number from [0, 1).

    Args:
        logits_NV: of one position per row, float32.
        params: of each row; temperature 0 takes the most likely token.
        uniforms: each row's random number, so that what it draws does not depend on the others.

    Returns:
        The tokens and their natural log-probs at the row's temperature (at 1 for greedy), both of shape ``[N]``.
    """
    temperatures = [one.temperature or 1.0 for one in params]
    if any(one != 1.0 for one in temperatures):
        logits_NV = logits_NV / logits_NV.new_tensor(temperatures)[:, None]
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    greedy = [one.temperature == 0 for one in params]
    if all(greedy):
        chosen_N = logprobs_NV.argmax(dim=-1)
    else:
        cumulative_NV = logprobs_NV.exp().cumsum(dim=-1, dtype=torch.float64)
        total_N = cumulative_NV[:, -1]
        uniform_N = torch.tensor(uniforms, dtype=torch.float64, device=logits_NV.device)
        target_N = torch.minimum(uniform_N * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
        chosen_N = torch.searchsorted(cumulative_NV, target_N[:, None], right=True)[:, 0]
        if any(greedy):
            greedy_N = torch.tensor(greedy, device=logits_NV.device)
            chosen_N = torch.where(greedy_N, logprobs_NV.argmax(dim=-1), chosen_N)
    return chosen_N, logprobs_NV.gather(1, chosen_N[:, None])[:, 0]
