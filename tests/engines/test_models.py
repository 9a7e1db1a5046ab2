"""Body and head of a model make the whole, and what cannot be loaded is explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from opd_env.engines.models import ModelUnavailable, load_model, split_model
from tests.tiny import tiny_llama, tiny_tokenizer

_SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def with_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_llama(vocab_size=40),
        lambda: tiny_llama(vocab_size=40, tie_word_embeddings=True),
        lambda: Gemma2ForCausalLM(Gemma2Config(**_SMALL, head_dim=8, final_logit_softcapping=0.1)),
        lambda: GraniteForCausalLM(GraniteConfig(**_SMALL, logits_scaling=7.0)),
        lambda: with_adapters(tiny_llama(vocab_size=40)),
    ],
    ids=["llama", "tied", "soft-capped", "scaled", "lora"],
)
def test_halves_make_the_whole(make: Any) -> None:
    model = make().eval()
    decoder, head = split_model(model)
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        halves = head(decoder(input_ids=ids).last_hidden_state[0])
        assert torch.allclose(halves, model(input_ids=ids).logits[0], atol=1e-5)


def test_an_unknown_head_is_refused() -> None:
    class Odd(type(tiny_llama())):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            output.logits = output.logits + 1
            return output

    model = Odd(tiny_llama(vocab_size=40).config)
    with pytest.raises(ValueError, match="differ by up to 1"):
        split_model(model)


def test_a_saved_model_is_loaded_from_its_folder(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert not loaded.model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [("packaged:pupil", "packaged:student"), ("./nowhere", "no folder"), ("no/such-model", "hub id")],
)
def test_what_is_not_there_is_explained(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match=message):
        load_model(name)
