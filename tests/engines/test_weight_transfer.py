"""Weights for servers: equal to the student's function, adapters merged, the student untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd_env.engines.models import plain_weights, save_plain
from tests.tiny import tiny_llama

IDS = torch.arange(3, 30)[None]


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_computes_what_the_student_does(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    save_plain(model, tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= names
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not saved.config.tie_word_embeddings
    assert torch.equal(saved(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens"]])
def test_adapters_are_merged_and_the_student_keeps_every_bit(tmp_path: Path, targets: str | list[str]) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_plain(model, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(saved(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    plain = tiny_llama()
    assert (saved(IDS).logits - plain(IDS).logits).abs().max() > 0.1  # the adapters do something
    assert set(plain_weights(model)) == set(plain.state_dict())
