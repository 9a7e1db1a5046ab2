"""Which engine samples a run's episodes, and the servers that settings name.

Worked example::

    engine = make_engine(config, student, chat, weights_folder)     # config.engine: local, vllm, or URLs
    update_engine(engine, student.model, accelerator)
    require_same_policy(engine, student, chat, accelerator)         # or: one sentence on what differs

Test it alone: ``pytest tests/trainer/run/test_engine_setup.py``
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd_env.engines.base import Engine
from opd_env.engines.local import LocalEngine
from opd_env.engines.models import LoadedModel
from opd_env.engines.servers.client import client_of
from opd_env.engines.servers.engine import HttpEngine, ServedWeights
from opd_env.engines.servers.probe import probe_servers, probe_vllm
from opd_env.engines.servers.urls import is_url
from opd_env.engines.vllm import VLLMEngine
from opd_env.formats import ChatFormat
from opd_env.trainer.run.config import OPDConfig
from opd_env.trainer.run.processes import on_each, on_main


def make_engine(config: OPDConfig, student: LoadedModel, chat: ChatFormat, weights_folder: Path) -> Engine:
    """The engine that ``config.engine`` names.

    Args:
        config: all settings.
        student: the model that samples; vLLM loads it anew by the name that ``config.student`` gives it.
        chat: the student's format.
        weights_folder: where servers find new weights.

    Raises:
        UserError: a server does not answer, or vLLM is not installed.
    """
    count = config.concurrent_episodes
    if is_url(config.engine):
        return HttpEngine(client_of(config.engine, count), chat.stop_token_ids, chat.vocab_size, weights_folder)
    if config.engine == "vllm":
        return VLLMEngine(
            config.student, chat.stop_token_ids, chat.vocab_size,
            capacity=count, max_context=config.limits.max_tokens, dtype=config.dtype, **config.vllm_options,
        )  # fmt: skip
    return LocalEngine(student.model, chat.stop_token_ids, chat.vocab_size, count, own_weights=config.rollout_ahead)


def update_engine(engine: Engine, model: Any, accelerator: Any) -> None:
    """Gives the engine new weights. Every process calls it, with its rollout ended.

    Servers are shared by all processes: the main one gives them the weights once, while none samples. A vLLM in the
    process gets the process's own weights, which are whole under every kind of parallelism.

    Args:
        engine: idle.
        model: the student, whole in every process.
        accelerator: of ``accelerate``.

    Raises:
        UserError: no server took them.
    """
    if not isinstance(engine, HttpEngine):
        engine.update_weights(model)
        return

    def update() -> ServedWeights | None:
        engine.update_weights(model)
        return engine.served

    with engine.held():
        accelerator.wait_for_everyone()
        served = on_main(accelerator, update)
        if served is not None and not accelerator.is_main_process:
            engine.follow(served)


def require_same_policy(engine: Engine, student: LoadedModel, chat: ChatFormat, accelerator: Any) -> None:
    """Refuses a vLLM that does not sample from the student as it is here. Every process calls it.

    Raises:
        UserError: what differs, and what to do.
    """
    if isinstance(engine, HttpEngine):
        on_main(accelerator, lambda: probe_servers(engine.client, chat, student.model))
    if isinstance(engine, VLLMEngine):
        on_each(lambda: probe_vllm(engine, chat, student.model))
