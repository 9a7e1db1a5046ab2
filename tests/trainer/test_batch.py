"""Which hidden state predicts which sampled token: against naive full logits, for every padding and split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from opd_env.episode.trajectory import StopReason, Trajectory, TurnRecord
from opd_env.formats.base import TokenKind
from opd_env.trainer.batch import PolicyModule, Row, make_batch, num_sampled, pack
from tests.trainer.toy import row_of

VOCABULARY, PADDED = 20, 24


def row(ids, sampled):
    return Row(np.asarray(ids, dtype=np.int32), np.asarray(sampled, dtype=np.bool_))


# prompt, two sampled, one tool token, one sampled; and a shorter one that ends in context
ROWS = [row([3, 4, 5, 6, 7, 8], [0, 0, 1, 1, 0, 1]), row([9, 10, 11, 12], [0, 1, 1, 0]), row([1, 2], [0, 1])]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=PADDED, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def naive_logprobs(model, rows):
    """One row at a time, all logits, an explicit loop: the log-prob of token t is read at position t - 1."""
    values = []
    for one in rows:
        ids = torch.tensor(one.token_ids_T.tolist())[None]
        logits = model(ids).logits[0, :, :VOCABULARY].log_softmax(-1)
        values += [logits[t - 1, ids[0, t]] for t in range(1, ids.shape[1]) if one.sampled_T[t]]
    return torch.stack(values)


def logprobs_of(policy, batch):
    def score(hidden_NH, head):
        return head(hidden_NH).log_softmax(-1).gather(1, batch.targets_N[:, None])[:, 0]

    return policy(batch, score)


def test_hand_written_indices():
    batch = make_batch(ROWS)
    assert batch.token_ids_BT.tolist() == [[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 0, 0], [1, 2, 0, 0, 0, 0]]
    assert batch.attention_mask_BT.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert batch.row_N.tolist() == [0, 0, 0, 1, 1, 2]
    assert batch.column_N.tolist() == [1, 2, 4, 0, 1, 0]
    assert batch.targets_N.tolist() == [5, 6, 8, 10, 11, 2]
    assert batch.index_N.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_subset_keeps_the_flat_order_of_all_rows():
    batch = make_batch(ROWS, [2, 0])
    assert batch.rows == (2, 0)
    assert batch.index_N.tolist() == [5, 0, 1, 2]
    assert batch.targets_N.tolist() == [2, 5, 6, 8]


def test_logprobs_equal_naive_full_logits(model):
    policy = PolicyModule(model, VOCABULARY)
    torch.testing.assert_close(logprobs_of(policy, make_batch(ROWS)), naive_logprobs(model, ROWS))


def test_a_shift_by_one_token_would_be_noticed(model):
    """The comparison above has teeth: reading one column later or earlier gives clearly other numbers."""
    policy, batch, right = PolicyModule(model, VOCABULARY), make_batch(ROWS), naive_logprobs(model, ROWS)
    for shift in (-1, 1):
        moved = type(batch)(**{**vars(batch), "column_N": batch.column_N + shift})
        assert (logprobs_of(policy, moved) - right).abs().max() > 0.1


def test_padding_rows_on_the_left_gives_the_same_logprobs(model):
    """Our batches pad right and pass no mask; a left-padded batch with mask and positions must agree."""
    batch, width = make_batch(ROWS), 6
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for index, one in enumerate(ROWS):
        length = len(one.token_ids_T)
        ids[index, width - length :] = torch.tensor(one.token_ids_T.tolist())
        mask[index, width - length :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[..., :VOCABULARY].log_softmax(-1)
    shift = width - torch.tensor([len(one.token_ids_T) for one in ROWS])[batch.row_N]
    left = logits[batch.row_N, batch.column_N + shift].gather(1, batch.targets_N[:, None])[:, 0]
    torch.testing.assert_close(logprobs_of(PolicyModule(model, VOCABULARY), batch), left)


def test_padding_of_the_head_gets_no_probability(model):
    policy = PolicyModule(model, VOCABULARY)
    total = policy(make_batch(ROWS), lambda hidden_NH, head: head(hidden_NH).softmax(-1).sum(-1))
    assert head_width(policy) == VOCABULARY
    torch.testing.assert_close(total, torch.ones_like(total))


def head_width(policy):
    return policy.head(torch.zeros(1, 16, dtype=torch.float64)).shape[-1]


def test_the_policy_registers_each_parameter_once(model):
    policy = PolicyModule(model, VOCABULARY)
    assert {name.removeprefix("model.") for name, _ in policy.named_parameters()} == {
        name for name, _ in model.named_parameters()
    }


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2**12 - 1)), min_size=1, max_size=9),
    budget=st.integers(1, 60),
)
def test_every_sampled_token_is_in_exactly_one_micro_batch_within_the_budget(lengths, budget):
    rows = [row(np.arange(n) + 1, [t > 0 and bool(bits >> t & 1) for t in range(n)]) for n, bits in lengths]
    batches = pack(rows, budget)
    flat = [index for batch in batches for index in batch.index_N.tolist()]
    assert sorted(flat) == list(range(num_sampled(rows)))
    targets = np.concatenate([one.token_ids_T[one.sampled_T] for one in rows])
    for batch in batches:
        assert batch.targets_N.tolist() == targets[batch.index_N.numpy()].tolist()
        assert batch.token_ids_BT.numel() <= budget or len(batch.rows) == 1
        assert (batch.column_N >= 0).all()


def test_rows_of_an_episode_stay_together_and_what_fits_the_budget_exactly_is_one_micro_batch():
    lengths = [(3, 0), (5, 0), (4, None), (5, None)]
    rows = [Row(np.arange(n, dtype=np.int32), np.arange(n) > 0, episode) for n, episode in lengths]
    assert [batch.rows for batch in pack(rows, 20)] == [(0, 1, 3, 2)]
    assert [batch.rows for batch in pack(rows, 19)] == [(0, 1, 3), (2,)]
    assert [batch.rows for batch in pack(rows, 1)] == [(0, 1), (3,), (2,)]


@pytest.mark.parametrize("budget", [1, 6, 12, 100])
def test_the_split_into_micro_batches_changes_no_logprob(model, budget):
    policy = PolicyModule(model, VOCABULARY)
    found = torch.empty(num_sampled(ROWS), dtype=torch.float64)
    for batch in pack(ROWS, budget):
        found[batch.index_N] = logprobs_of(policy, batch).detach()
    torch.testing.assert_close(found, naive_logprobs(model, ROWS))


def trajectory():
    kinds = [TokenKind.PROMPT] * 2 + [TokenKind.TOOL_CALL] * 2 + [TokenKind.TOOL_OUTPUT, TokenKind.TEXT]
    sampled = np.array([0, 0, 1, 1, 0, 1], dtype=np.bool_)
    return Trajectory(
        task="t", example_id="e", sample=0,
        token_ids=np.array([3, 4, 5, 6, 7, 8], dtype=np.int32), sampled=sampled,
        kind=np.array(kinds, dtype=np.uint8), turn=np.array([0, 0, 1, 1, 1, 2], dtype=np.int16),
        logprobs=np.where(sampled, -0.5, 0).astype(np.float32),
        turns=(TurnRecord(2, 4, "call"), TurnRecord(5, 6, "text")), stop_reason=StopReason.ANSWER,
        answer="text", correct=True,
    )  # fmt: skip


def test_another_prompt_moves_the_sampled_tokens_and_nothing_else(model):
    """A teacher with a longer prompt scores the same tokens, each after its own longer prefix."""
    long = row_of(trajectory(), [[15, 16, 17, 18]])
    assert long.token_ids_T.tolist() == [15, 16, 17, 18, 5, 6, 7, 8]
    assert long.token_ids_T[long.sampled_T].tolist() == [5, 6, 8]
    batch = make_batch([row_of(trajectory()), long])
    found = logprobs_of(PolicyModule(model, VOCABULARY), batch)
    torch.testing.assert_close(found, naive_logprobs(model, [row_of(trajectory()), long]))
    assert (found[:3] - found[3:]).abs().max() > 0.01


def test_a_row_that_starts_with_a_sampled_token_is_refused():
    with pytest.raises(ValueError, match="no prefix predicts it"):
        row([1, 2], [1, 0])
    with pytest.raises(ValueError, match="must be two"):
        row([1, 2], [0])
