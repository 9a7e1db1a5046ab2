"""Settings that train, eval and rollout share, each field once: what is played, by which model, and how.

A command's settings inherit these groups of fields (``opd-env eval --engine vllm``), or hold them as a group
(``opd-env train --sampling.engine vllm``).

Test it alone: ``pytest tests/settings tests/cli``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from typing import Any

from opd_env.episode.limits import RolloutLimits
from opd_env.settings.fields import ConfigError, Settings, import_files, number
from opd_env.tools.mcp.tools import register_mcp_servers


class Precision(StrEnum):
    """Number format of a model's weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    """Not for training: small gradients become 0 in it."""


@dataclass(frozen=True, kw_only=True)
class ModelFields(Settings):
    """A model that plays, and how its turns are read."""

    model: str
    """packaged:student, packaged:teacher, smollm2, a folder that save_pretrained wrote, or a hub id."""
    dtype: Precision = Precision.FLOAT32
    """Number format of the weights."""
    chat_format: str | None = None
    """Name of the chat format; null finds it from the tokenizer's template."""
    repair_calls: bool = False
    """Put small faults of calls right when they are read, and count each; scores then hold calls that were faulty."""

    def check(self) -> None:
        """Refuses an unknown format before anything is loaded."""
        if self.chat_format is not None:
            from opd_env.formats import format_named

            try:
                format_named(self.chat_format)
            except ValueError as error:
                raise ConfigError(f"{self.key('chat_format')}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class TaskFields(Settings):
    """What is played, with which tools, and where tools and tasks that are not built in come from."""

    task_options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task, such as a data file or difficulty levels."""
    tools: tuple[str, ...] | None = None
    """Names of the tools on offer; null takes the task's own."""
    imports: tuple[str, ...] = ()
    """Python files to run first, so that their @tool, @register_task and register_divergence take effect."""
    mcp_servers: Mapping[str, Any] = field(default_factory=dict)
    """MCP servers whose tools can be named in ``tools``: by a name of your choice, the options of ``mount_mcp``, such
    as ``{shop: {server: [python, shop.py]}}``."""
    ray_address: str | None = None
    """A Ray cluster to run the processes of tools in, such as auto or host:port; null runs them on this machine."""

    def register(self) -> None:
        """Makes the names in ``task`` and ``tools`` known.

        Raises:
            ConfigError: a file cannot be run.
            UserError: a server or a cluster cannot be reached.
        """
        import_files(self.imports)
        register_mcp_servers(self.mcp_servers)
        if self.ray_address:
            # By its name: bridges stand above everything, and nothing below may need Ray.
            import_module("opd_env.plugins.ray").connect_ray(self.ray_address)


@dataclass(frozen=True, kw_only=True)
class SamplingFields(Settings):
    """What samples the turns, and how much of it."""

    limits: RolloutLimits = field(default_factory=RolloutLimits)
    """Budgets of an episode."""
    engine: str = "local"
    """What samples: local (transformers), vllm (in this process), or URLs of vLLM servers that serve the model, as
    a,b."""
    vllm_options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of every vllm.LLM in this process, such as ``{gpu_memory_utilization: 0.3}``."""
    concurrent_episodes: int = number(64, low=1)
    """Episodes that the engine plays side by side; memory grows with it."""

    def check(self) -> None:
        """Refuses an engine that does not exist."""
        if self.engine not in ("local", "vllm") and not self.engine.startswith(("http://", "https://")):
            raise ConfigError(
                f"{self.key('engine')}={self.engine!r} is unknown; set local, vllm, or the URLs of vLLM servers, such "
                "as http://127.0.0.1:8000"
            )
