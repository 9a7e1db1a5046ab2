"""From settings to an engine: the one way, for training, evaluation and rollouts.

Worked example::

    engine = open_engine("vllm", loaded, chat, concurrent_episodes=64, max_context=2048)
    probe_engine(engine, chat, loaded.model)       # or: one sentence on what the engine holds instead

Test it alone: ``pytest tests/trainer/run/test_engine.py``
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_env.engines.base import Engine
from opd_env.engines.local import LocalEngine
from opd_env.engines.models import LoadedModel
from opd_env.engines.probe import probe_servers, probe_vllm
from opd_env.engines.servers.client import client_of
from opd_env.engines.servers.engine import HttpEngine
from opd_env.engines.servers.transport import is_url
from opd_env.engines.vllm import VLLMEngine
from opd_env.formats import ChatFormat


def open_engine(
    name: str,
    loaded: LoadedModel,
    chat: ChatFormat,
    *,
    concurrent_episodes: int,
    max_context: int,
    dtype: str = "float32",
    vllm_options: Mapping[str, Any] | None = None,
    weights_folder: Path | None = None,
    own_weights: bool = False,
) -> Engine:
    """The engine of that name, with the weights of ``loaded``.

    Args:
        name: local, vllm, or URLs of vLLM servers, as a,b.
        loaded: the model that samples; vLLM loads it anew by its name.
        chat: the model's format.
        concurrent_episodes: played side by side.
        max_context: tokens of the longest episode; vLLM makes room for as many.
        dtype: number format of vLLM's weights.
        vllm_options: further arguments of ``vllm.LLM``.
        weights_folder: where servers find new weights; None: theirs never change.
        own_weights: whether the local engine copies the weights, so that training them does not change what it samples.

    Raises:
        UserError: a server does not answer, or vLLM is not installed.
    """
    if is_url(name):
        client = client_of(name, concurrent_episodes)
        return HttpEngine(client, chat.stop_token_ids, chat.vocab_size, weights_folder)
    if name == "vllm":
        return VLLMEngine(
            loaded.name, chat.stop_token_ids, chat.vocab_size, capacity=concurrent_episodes, max_context=max_context,
            dtype=dtype, **(vllm_options or {}),
        )  # fmt: skip
    return LocalEngine(loaded.model, chat.stop_token_ids, chat.vocab_size, concurrent_episodes, own_weights=own_weights)


def probe_engine(engine: Engine, chat: ChatFormat, model: Any) -> None:
    """Refuses a vLLM that does not hold the weights of ``model``; the local engine samples from the model itself.

    Raises:
        UserError: what differs, and what to do.
    """
    if isinstance(engine, HttpEngine):
        probe_servers(engine.client, chat, model)
    elif isinstance(engine, VLLMEngine):
        probe_vllm(engine, chat, model)
