"""Writes a student's weights as a plain model that an inference server can load: adapters merged, nothing tied.

Worked example::

    save_plain(student.model, Path("runs/demo/weights"))        # config.json and *.safetensors

The student itself is not changed by a bit: merging and unmerging adapters in place would round its weights. A tied
output layer is written as its own tensor, for vLLM on a CPU keeps a packed copy of it that a reload of the input
embedding does not refresh.

Test it alone: ``pytest tests/engines/test_weight_transfer.py``
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from opd_env.engines.models import without_bars


def plain_weights(model: Any) -> dict[str, Tensor]:
    """Weights by their names in the plain model; merged ones are new tensors, the others the model's own."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    weights: dict[str, Tensor] = {}
    for name, tensor in causal.state_dict().items():
        if ".lora_" not in name and "lora_embedding" not in name:
            weights[name.replace(".base_layer.", ".")] = tensor.detach()
    for name, module in causal.named_modules():
        for adapter in getattr(module, "active_adapters", ()) if hasattr(module, "get_delta_weight") else ():
            key = f"{name}.weight"
            weights[key] = weights[key] + module.get_delta_weight(adapter).detach().to(weights[key].dtype)
    return weights


def save_plain(model: Any, folder: Path) -> None:
    """Writes ``config.json`` and safetensors files into a folder, which is made.

    Args:
        model: a causal language model of transformers, or a PEFT wrapper of one with LoRA adapters.
        folder: where to.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    weights = plain_weights(model)
    head = next(name for name, module in causal.named_modules() if module is causal.get_output_embeddings())
    weights[f"{head}.weight"] = weights[f"{head}.weight"].clone()
    with without_bars():
        causal.save_pretrained(folder, state_dict=weights)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for settings in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in settings:
            settings["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2))
