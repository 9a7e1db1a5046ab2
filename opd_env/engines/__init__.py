"""Engines: they continue token ids, with the log-prob of every token that they sample.

What it is: the local engine (transformers, with kept caches), vLLM in this process, servers of vLLM, and a scripted
engine for tests; the models that they run; ``probe``, which refuses a vLLM that would bias training.
Stands on: ``formats``, for the probes alone. It knows no episode and no task: token ids in, token ids out.
Read first: ``base``, the contract; then ``local``.
Who may change it: with the agreement tests (sampled log-probs equal the trainer's to 1e-5); ``servers`` is sealed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_env._lazy import lazy_face

if TYPE_CHECKING:
    from opd_env.engines.base import Completion as Completion
    from opd_env.engines.base import Engine as Engine
    from opd_env.engines.base import Request as Request
    from opd_env.engines.base import SamplingParams as SamplingParams
    from opd_env.engines.base import ScriptedEngine as ScriptedEngine
    from opd_env.engines.local import LocalEngine as LocalEngine
    from opd_env.engines.models import LoadedModel as LoadedModel
    from opd_env.engines.models import load_model as load_model
    from opd_env.engines.models import load_tokenizer as load_tokenizer
    from opd_env.engines.vllm import VLLMEngine as VLLMEngine

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "base": ("Completion", "Engine", "Request", "SamplingParams", "ScriptedEngine"),
        "local": ("LocalEngine",),
        "models": ("LoadedModel", "load_model", "load_tokenizer"),
        "vllm": ("VLLMEngine",),
    },
)
