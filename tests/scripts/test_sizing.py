"""The sizing formulas against models that exist: weights, optimiser state, kept activations, KV cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opd_env.trainer.batch import PolicyModule
from opd_env.trainer.learn.update import Updater
from opd_env.trainer.run.sft import supervised_objective
from scripts.sizing import (
    H100,
    SHAPES,
    Shape,
    activation_bytes,
    decode_rate,
    gpus,
    score_rate,
    serving_bytes,
    shared_bytes,
    table,
    train_rate,
    training_bytes,
)  # fmt: skip
from tests.trainer.toy import made_trajectory, row_of

SMALL = [Shape(2, 64, 128, 4, 2, 16, 300, tied=False), Shape(3, 64, 256, 4, 4, 16, 300, tied=True),
         Shape(2, 128, 512, 8, 2, 16, 300, tied=False), Shape(2, 64, 128, 8, 2, 16, 300, tied=True)]  # fmt: skip


def config_of(shape: Shape) -> dict[str, object]:
    return {
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size, "tie_word_embeddings": shape.tied, "max_position_embeddings": 1024,
    }  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_number_of_weights_is_that_of_transformers(name: str) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        kind, config = (LlamaForCausalLM, LlamaConfig) if name == "70B" else (Qwen3ForCausalLM, Qwen3Config)
        model = kind(config(**config_of(shape)))
    assert shape.parameters == pytest.approx(model.num_parameters(), rel=1e-3)
    billions = float(name.removesuffix("B"))
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.06)


@pytest.mark.parametrize("shape", SMALL)
def test_kept_activations_are_what_autograd_really_keeps(shape: Shape) -> None:
    model = LlamaForCausalLM(LlamaConfig(**config_of(shape))).model
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value  # held, so that no storage is used twice
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model(input_ids=torch.zeros(2, 64, dtype=torch.long), use_cache=False)
    found = sum(value.untyped_storage().nbytes() for value in kept.values())
    assert activation_bytes(shape, 2 * 64) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("shape", SMALL[:2])
def test_weights_gradients_and_optimiser_take_four_times_the_weights(shape: Shape) -> None:
    model = LlamaForCausalLM(LlamaConfig(**config_of(shape)))
    updater = Updater(PolicyModule(model, shape.vocab), Accelerator(cpu=True))
    gradients = []
    for value in model.parameters():
        value.register_post_accumulate_grad_hook(lambda value: gradients.append(value.grad.nbytes))
    updater.update([row_of(made_trajectory(0))], supervised_objective, 1e-3)
    moments = [v.nbytes for state in updater.parallel.optimizer.state.values() for k, v in state.items() if k != "step"]
    found = sum(value.nbytes for value in model.parameters()) + sum(gradients) + sum(moments)
    assert training_bytes(shape, tokens=0) == pytest.approx(found, rel=0.02)


def test_shares_and_recomputing_lower_the_memory_and_a_whole_copy_stays() -> None:
    shape = SHAPES["8B"]
    alone, shared = training_bytes(shape, tokens=0), training_bytes(shape, processes=8, tokens=0)
    assert alone == 16 * shape.parameters
    assert shared == pytest.approx(16 * shape.parameters / 8 + 4 * shape.parameters)
    assert activation_bytes(shape, 8192, recompute=True) < activation_bytes(shape, 8192) / 10


def test_a_servers_cache_is_that_of_the_model() -> None:
    shape = SMALL[0]
    model = LlamaForCausalLM(LlamaConfig(**config_of(shape)))
    cache = model(input_ids=torch.zeros(3, 10, dtype=torch.long), use_cache=True).past_key_values
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    weights = 4 * shape.parameters
    assert serving_bytes(shape, episodes=3, length=10, bytes_per_value=4) - weights == found


def test_rates_stay_below_the_data_sheet_and_fall_with_size() -> None:
    shapes = list(SHAPES.values())
    for rate in (train_rate, score_rate, decode_rate):
        rates = [rate(shape) for shape in shapes]
        assert rates == sorted(rates, reverse=True)
    for shape in shapes:
        assert train_rate(shape) * 6 * shape.parameters < H100.flops
        assert score_rate(shape) * 2 * shape.parameters < H100.flops
        assert decode_rate(shape, episodes=1) * 2 * shape.parameters < H100.bandwidth


@pytest.mark.parametrize(("needed", "expected"), [(1e9, 1), (72e9, 1), (73e9, 2), (150e9, 4), (500e9, 8)])
def test_servers_take_a_power_of_two_of_gpus(needed: float, expected: int) -> None:
    assert gpus(needed) == expected


def test_the_page_shows_the_table_that_the_formulas_give() -> None:
    assert table() in (Path(__file__).parents[2] / "docs" / "sizing.md").read_text()


@pytest.mark.parametrize("shape", SMALL)
def test_an_offloaded_teacher_leaves_its_head_or_takes_the_place_of_the_activations(shape: Shape) -> None:
    model = LlamaForCausalLM(LlamaConfig(**config_of(shape)))
    whole, head = (
        sum(value.nbytes for value in {id(one): one for one in part.parameters()}.values() if value.dim() > 1)
        for part in (model, model.get_output_embeddings())
    )
    student = SMALL[0]
    for tokens in (1, 100_000):  # which phase is the larger one
        alone, kept = training_bytes(student, tokens=tokens), activation_bytes(student, tokens)
        assert shared_bytes(student, [shape, shape], offload=False, tokens=tokens) == alone + 2 * whole
        found = shared_bytes(student, [shape, shape], offload=True, tokens=tokens)
        assert found == (max(alone - kept + whole, alone + 2 * head) if tokens == 1 else alone + 2 * head)
