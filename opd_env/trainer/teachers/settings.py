"""Settings of a run's teachers: the group ``teacher``.

Test it alone: ``pytest tests/trainer/run/test_config.py``
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from opd_env.engines.servers.transport import is_url
from opd_env.episode.settings import Precision
from opd_env.settings.fields import ConfigError, Settings, number


class TeacherEngine(StrEnum):
    """What runs teachers that are models rather than URLs."""

    LOCAL = "local"
    """Transformers."""
    VLLM = "vllm"
    """vLLM in this process."""


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(Settings):
    """Who scores the student's tokens, and what the teacher reads beside them."""

    path = "teacher"
    model: str
    """The model that scores the student's tokens, or the URLs of vLLM servers that serve it, as a,b.
    The student's own name means its initial weights."""
    dtype: Precision = Precision.FLOAT32
    """Number format of the teacher's weights."""
    engine: TeacherEngine = TeacherEngine.LOCAL
    """What runs teachers that are models: local (transformers), or vllm (in this process; not for estimator=full)."""
    demonstrations: int = number(0, low=0, high=64)
    """Worked examples of the task put into the teacher's prompt only, 0 to 64 (self-distillation)."""
    sees_answer: bool = False
    """The gold answer stands at the end of the question in the teacher's prompt only (self-distillation)."""
    routes: Mapping[str, str] = field(default_factory=dict)
    """Other teachers (models or servers) by the name of a tool that a problem offers, or of its task. Not for
    estimator=full."""
    mixture: Mapping[str, float] = field(default_factory=dict)
    """Teachers (models or servers, ``model`` among them) that act as a single one by the weighted mean of their
    distributions: weights above 0 with a sum of 1. Empty: ``model`` alone."""
    offload: bool = False
    """Keep teachers in CPU memory while they do not score; only one at a time is on the accelerator."""
    cross_tokenizer: bool = False
    """The teacher has another tokenizer: compare on spans of text that both cut alike (sampled estimator)."""
    cache: str | None = None
    """Folder in which the teacher's log-probs are kept and found again; null keeps none. Not for estimator=full."""

    @property
    def outside(self) -> str:
        """Names of teachers that vLLM runs; empty if there is none."""
        names = (self.model, *self.mixture, *self.routes.values())
        in_process = self.engine is not TeacherEngine.LOCAL
        return ", ".join(dict.fromkeys(name for name in names if in_process or is_url(name)))

    def check(self) -> None:
        """Refuses a mixture that is none, and options that the teacher's engine does not have."""
        if self.mixture and self.model not in self.mixture:
            raise ConfigError(
                f"teacher.mixture names {', '.join(self.mixture)} but not teacher.model={self.model}; give all "
                "teachers of the mixture, and name one of them as teacher.model"
            )
        if self.mixture and (min(self.mixture.values()) <= 0 or not abs(math.fsum(self.mixture.values()) - 1) <= 1e-6):
            shown = ", ".join(f"{name}: {weight}" for name, weight in self.mixture.items())
            raise ConfigError(f"teacher.mixture is {{{shown}}}; the weights must be above 0 and add up to 1")
        if self.outside and (self.cross_tokenizer or self.cache is not None):
            name = "cross_tokenizer" if self.cross_tokenizer else "cache"
            raise ConfigError(
                f"teacher.{name} needs a teacher in this process that transformers runs, not {self.outside}; name a "
                "model, with teacher.engine=local"
            )
        if self.offload and self.engine is not TeacherEngine.LOCAL:
            raise ConfigError("teacher.offload is for teachers of teacher.engine=local; vLLM keeps its own memory")
        if self.cross_tokenizer:
            for name in ("demonstrations", "sees_answer", "routes", "mixture", "cache"):
                if getattr(self, name):
                    raise ConfigError(
                        f"teacher.{name}={getattr(self, name)} does not work with teacher.cross_tokenizer, which "
                        f"judges spans of text by one teacher that reads what the student read; leave "
                        f"teacher.{name} out"
                    )
