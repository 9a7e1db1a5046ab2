"""The engine of a run over its processes: opened, given new weights, and compared with the student.

Worked example::

    engine = make_engine(config, student, chat, weights_folder)     # sampling.engine: local, vllm, or URLs
    update_engine(engine, student.model, accelerator)
    require_same_policy(engine, student, chat, accelerator)         # or: one sentence on what differs

Test it alone: ``pytest tests/trainer/run/test_engine.py``
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd_env.engines.base import Engine
from opd_env.engines.models import LoadedModel
from opd_env.engines.open import open_engine, probe_engine
from opd_env.engines.servers.engine import HttpEngine, ServedWeights
from opd_env.formats import ChatFormat
from opd_env.trainer.run.config import OPDConfig
from opd_env.trainer.run.processes import on_each, on_main


def make_engine(config: OPDConfig, student: LoadedModel, chat: ChatFormat, weights_folder: Path) -> Engine:
    """The engine that ``sampling.engine`` names; see ``open_engine``."""
    sampling = config.sampling
    return open_engine(
        sampling.engine,
        # vLLM loads what the settings name, also where the student was handed in.
        LoadedModel(student.model, student.tokenizer, config.student.model),
        chat,
        concurrent_episodes=sampling.concurrent_episodes,
        max_context=sampling.limits.max_tokens,
        dtype=config.student.dtype,
        vllm_options=sampling.vllm_options,
        weights_folder=weights_folder,
        own_weights=sampling.rollout_ahead,
    )


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
        on_main(accelerator, lambda: probe_engine(engine, chat, student.model))
    else:
        on_each(lambda: probe_engine(engine, chat, student.model))
