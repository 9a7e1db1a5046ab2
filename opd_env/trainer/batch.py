"""From trajectories to tensors: which hidden state predicts which sampled token, and nothing else.

Rows are padded on the right and grouped, by length, into micro-batches of a bounded number of tokens. Every
number about a sampled token stands in a flat vector ``_N`` in one fixed order: trajectories as given, tokens
as sampled, whichever row they stand in. So neither padding nor the split into micro-batches can move a value to
another token::

    rows = [row for trajectory in trajectories for row in rows_of(trajectory)]
    scores_N = torch.empty(num_sampled(rows))
    for batch in pack(rows, tokens_per_microbatch=4096):
        scores_N[batch.index_N] = policy(batch, lambda hidden_NH, head: …)

Test it alone: ``pytest tests/trainer/test_batch.py``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from opd_env.engines.models import split_model
from opd_env.episode.trajectory import Trajectory

Result = TypeVar("Result")
Head = Callable[[Tensor], Tensor]
"""Hidden states ``[N, H]`` to logits ``[N, V]``."""


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence as a model reads it.

    Raises:
        ValueError: shapes differ, or the first token is marked as sampled (nothing predicts it).
    """

    token_ids_T: NDArray[np.int32]
    sampled_T: NDArray[np.bool_]
    episode: int | None = None
    """Neighbouring rows with the same number stay in one micro-batch, where ``by_episode`` puts them together; None for
    a row that may stand alone."""

    def __post_init__(self) -> None:
        if self.token_ids_T.shape != self.sampled_T.shape or self.token_ids_T.ndim != 1:
            raise ValueError(f"token ids {self.token_ids_T.shape} and mask {self.sampled_T.shape} must be two [T]")
        if len(self.sampled_T) and self.sampled_T[0]:
            raise ValueError("the first token of a row cannot be a sampled one: no prefix predicts it")


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Some rows as tensors, padded on the right."""

    token_ids_BT: Tensor
    attention_mask_BT: Tensor
    """1 at tokens, 0 at padding."""
    row_N: Tensor
    """Row of each sampled token."""
    column_N: Tensor
    """Column whose hidden state predicts the sampled token: the one before it."""
    targets_N: Tensor
    """Id of each sampled token."""
    index_N: Tensor
    """Place of each sampled token in the flat order of all rows that were packed. On the CPU."""
    episode_N: Tensor
    """Episode of each sampled token, counted within the batch. A row that may stand alone counts as one."""
    rows: tuple[int, ...]
    """Numbers of the rows that were packed, in the order of ``token_ids_BT``."""

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same batch with the tensors that a model reads on ``device``."""
        return MicroBatch(
            self.token_ids_BT.to(device),
            self.attention_mask_BT.to(device),
            self.row_N.to(device),
            self.column_N.to(device),
            self.targets_N.to(device),
            self.index_N,
            self.episode_N.to(device),
            self.rows,
        )

    def by_episode(self, values_N: Tensor) -> tuple[Tensor, Tensor]:
        """Values of sampled tokens, each episode in a line of its own, shape ``[E, S]``, and the mask of those that
        exist.

        ``result[mask]`` is ``values_N`` again.
        """
        counts_E = torch.bincount(self.episode_N)
        width = int(counts_E.max())
        mask_ES = torch.arange(width, device=values_N.device) < counts_E[:, None].to(values_N.device)
        values_ES = values_N.new_zeros(len(counts_E), width)
        values_ES[mask_ES] = values_N
        return values_ES, mask_ES


def rows_of(
    trajectory: Trajectory, prefixes: Sequence[Sequence[int]] | None = None, episode: int | None = None
) -> list[Row]:
    """A trajectory's rows.

    Args:
        trajectory: a finished episode.
        prefixes: for each row the token ids that replace those before its first sampled token (a teacher that reads
            more than the student did); everything after stays, so sampled tokens keep their order and number.
        episode: see ``Row``.
    """
    rows = []
    for number, row in enumerate(trajectory.rows):
        token_ids_T, sampled_T = trajectory.token_ids[row], trajectory.sampled[row]
        if prefixes is not None:
            length = int(sampled_T.argmax()) if sampled_T.any() else len(sampled_T)
            prefix = np.asarray(prefixes[number], dtype=np.int32)
            token_ids_T = np.concatenate([prefix, token_ids_T[length:]])
            sampled_T = np.concatenate([np.zeros(len(prefix), dtype=np.bool_), sampled_T[length:]])
        rows.append(Row(token_ids_T, sampled_T, episode))
    return rows


def num_sampled(rows: Sequence[Row]) -> int:
    """Sampled tokens of all rows."""
    return sum(int(row.sampled_T.sum()) for row in rows)


def make_batch(rows: Sequence[Row], members: Sequence[int] | None = None) -> MicroBatch:
    """One micro-batch of the rows numbered ``members`` (all when None), in that order.

    ``index_N`` counts sampled tokens over all ``rows``, members or not.
    """
    members = range(len(rows)) if members is None else members
    offsets = np.cumsum([0, *(int(row.sampled_T.sum()) for row in rows)])
    width = max(len(rows[member].token_ids_T) for member in members)
    token_ids_BT = np.zeros((len(members), width), dtype=np.int64)
    sampled_BT = np.zeros((len(members), width), dtype=np.bool_)
    attention_mask_BT = np.zeros((len(members), width), dtype=np.int64)
    for place, member in enumerate(members):
        row = rows[member]
        token_ids_BT[place, : len(row.token_ids_T)] = row.token_ids_T
        sampled_BT[place, : len(row.token_ids_T)] = row.sampled_T
        attention_mask_BT[place, : len(row.token_ids_T)] = 1
    row_N, column_N = np.nonzero(sampled_BT)
    numbers = [rows[member].episode for member in members]
    starts_B = [number is None or number != before for before, number in pairwise([None, *numbers])]
    index_N = np.concatenate([np.arange(offsets[member], offsets[member + 1]) for member in members])
    return MicroBatch(
        token_ids_BT=torch.from_numpy(token_ids_BT),
        attention_mask_BT=torch.from_numpy(attention_mask_BT),
        row_N=torch.from_numpy(row_N),
        column_N=torch.from_numpy(column_N - 1),
        targets_N=torch.from_numpy(token_ids_BT[row_N, column_N]),
        index_N=torch.from_numpy(index_N),
        episode_N=torch.from_numpy((np.cumsum(starts_B) - 1)[row_N]),
        rows=tuple(members),
    )


def pack(rows: Sequence[Row], tokens_per_microbatch: int) -> list[MicroBatch]:
    """All rows in micro-batches of at most ``tokens_per_microbatch`` padded tokens, longest rows first.

    A row longer than that, or the rows of an episode that stay together, are a micro-batch of their own. Rows without
    a sampled token are left out.
    """
    lengths = [len(row.token_ids_T) for row in rows]
    together: dict[tuple[bool, int], list[int]] = {}
    for member, row in enumerate(rows):
        if row.sampled_T.any():
            key = (True, member) if row.episode is None else (False, row.episode)
            together.setdefault(key, []).append(member)
    longest_first = sorted(together.values(), key=lambda unit: (-max(lengths[member] for member in unit), unit[0]))
    groups: list[list[int]] = []
    width = 0
    for unit in longest_first:
        if groups and width * (len(groups[-1]) + len(unit)) <= tokens_per_microbatch:
            groups[-1] += unit
        else:
            groups.append(unit)
            width = max(lengths[member] for member in unit)
    return [make_batch(rows, group) for group in groups]


class PolicyModule(nn.Module):
    """A causal language model whose forward pass gives hidden states at sampled tokens only.

    The logits of all positions, ``[B, T, V]``, are never made. ``forward`` does all work that needs
    gradients, so that data-parallel wrappers see it.

    Args:
        model: a Hugging Face causal language model, or a peft wrapper of one.
        vocab_size: tokens of the tokenizer. Rows of the head beyond it are padding, and get no probability.
        gradient_checkpointing: keep only the input of every layer for the backward pass and compute the rest again.

    Raises:
        ValueError: the model has no layers that can be computed again.
    """

    def __init__(self, model: Any, vocab_size: int, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self._recomputed = _recomputed_layers(model) if gradient_checkpointing else []
        decoder, head = split_model(model)
        self.model = model
        self.vocab_size = vocab_size
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # what FSDP2 shards one by one
        self._parts = (decoder, head)  # In a tuple, so that no parameter is registered twice.

    def forward(self, batch: MicroBatch, score: Callable[[Tensor, Head], Result]) -> Result:
        """What ``score`` makes of the hidden states ``[N, H]`` that predict the batch's sampled tokens.

        Args:
            batch: N sampled tokens in B rows.
            score: called with the hidden states and the head, which gives logits ``[N, vocab_size]``.
        """
        decoder, _ = self._parts
        for layer in self._recomputed:
            layer.training = True
        # Causal attention never looks right, so padding on the right needs no mask to be exact.
        hidden_BTH = decoder(input_ids=batch.token_ids_BT, use_cache=False).last_hidden_state
        for layer in self._recomputed:
            layer.training = False
        return score(hidden_BTH[batch.row_N, batch.column_N], self.head)

    def head(self, hidden_NH: Tensor) -> Tensor:
        """Logits ``[N, vocab_size]`` of hidden states ``[N, H]``."""
        logits_NV = self._parts[1](hidden_NH)
        return logits_NV if logits_NV.shape[-1] == self.vocab_size else logits_NV[..., : self.vocab_size]


def _recomputed_layers(model: Any) -> list[nn.Module]:
    """The layers of a transformers model, told to compute themselves again in the backward pass.

    They do so while they are in training mode. Their parts never are: dropout stays off, as in sampling.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} has no layers that can be computed again")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return layers
