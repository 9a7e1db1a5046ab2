"""Builds a run's teachers from its settings: what they read, whom each problem is routed to, what is known already.

Worked example::

    teachers = make_teachers(config, [task, eval_task], chat, student, device)
    teachers.scorer.score(trajectories)

Test it alone: ``pytest tests/trainer/run/test_setup.py tests/trainer/teachers/test_routing.py``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from opd_env.engines.models import LoadedModel, load_model, load_outline, weights_hash
from opd_env.engines.servers.client import RequestRefused, client_of
from opd_env.engines.servers.probe import probe_servers, probe_vllm, same_scores
from opd_env.engines.servers.scores import score_tokens
from opd_env.engines.servers.urls import is_url
from opd_env.engines.vllm import VLLMEngine
from opd_env.errors import unknown
from opd_env.formats import ChatFormat, TemplateFormat
from opd_env.messages import user
from opd_env.settings.fields import ConfigError
from opd_env.tasks import Task
from opd_env.tools import list_tools
from opd_env.trainer.run.config import OPDConfig, TeacherEngine
from opd_env.trainer.teachers.base import LocalTeacher, Prompt, Teacher
from opd_env.trainer.teachers.cache import CachedTeacher
from opd_env.trainer.teachers.cross_tokenizer import CrossTokenizerTeacher
from opd_env.trainer.teachers.fits import require_compatible
from opd_env.trainer.teachers.lookup import ExampleLookup
from opd_env.trainer.teachers.mixture import LocalMixture, Mixture
from opd_env.trainer.teachers.prompts import DemonstrationFormat, TaskPrompts, play_demonstrations
from opd_env.trainer.teachers.routing import NameRoute, RoutedTeacher
from opd_env.trainer.teachers.served import ServerTeacher, VLLMTeacher

Single = LocalTeacher | ServerTeacher | VLLMTeacher
"""A teacher that is one model."""


@dataclass(frozen=True)
class Teachers:
    """Who teaches in a run."""

    members: Mapping[str, Single]
    """By its name in the settings: first the teacher that ``teacher`` names, then the others of its mixture. They are
    evaluated beside the student."""
    scorer: Teacher
    """What scores the student's tokens: that teacher or mixture, several by problem, or one that remembers."""
    chat: ChatFormat
    """The members' format: the student's, one whose prompts hold demonstrations, or that of another family. The gold
    answer is never in it."""
    extra_tokens: int
    """By how much the teachers' prompts may be longer than the student's."""
    in_vllm: Sequence[VLLMTeacher] = ()
    """Those, routed ones included, that vLLM runs in this process."""

    @property
    def named(self) -> Single:
        """The teacher that ``teacher`` names."""
        return next(iter(self.members.values()))

    def close(self) -> None:
        """Ends the vLLM of this process."""
        for teacher in self.in_vllm:
            teacher.close()


def make_teachers(
    config: OPDConfig,
    tasks: Sequence[Task],
    chat: TemplateFormat,
    student: LoadedModel,
    device: torch.device,
    teacher: LoadedModel | None = None,
) -> Teachers:
    """Builds them.

    Args:
        config: all settings.
        tasks: the one trained on, then the one evaluated on.
        chat: the student's format.
        student: for the check that the teachers fit.
        device: where they compute.
        teacher: the model that ``config.teacher`` names, if it is loaded already.

    Raises:
        ValueError: a name is unknown, or a model does not fit the student.
        ModelUnavailable: a model cannot be loaded.
    """
    task, find = tasks[0], ExampleLookup(tasks)

    def model(name: str) -> LoadedModel:
        home = torch.device("cpu") if config.teacher_offload else device
        if teacher is not None and name == config.teacher:
            teacher.model.to(home)
            return teacher
        return load_model(name, dtype=config.teacher_dtype, device=home)

    options: dict[str, Any] = {
        "temperature": config.temperature,
        "tokens_per_microbatch": config.tokens_per_microbatch,
        "device": device,
    }
    if config.cross_tokenizer:
        other = CrossTokenizerTeacher(model(config.teacher), chat, find, config.tools, **options)
        return Teachers({config.teacher: other.local}, other, other.chat, 0)
    teacher_chat: ChatFormat = chat
    prompt, extra = None, 0
    if config.teacher_demonstrations:
        played = play_demonstrations(
            task, chat, count=config.teacher_demonstrations, tools=config.tools, seed=config.seed
        )
        teacher_chat = demonstrations = DemonstrationFormat(chat, played)
        extra = demonstrations.longest
        prompt = TaskPrompts(find, teacher_chat, config.tools)
    if config.teacher_sees_answer:
        plain = TaskPrompts(find, teacher_chat, config.tools)
        prompt = TaskPrompts(find, teacher_chat, config.tools, answer=True)
        extra += max(len(prompt.render(task, one)) - len(plain.render(task, one)) for one in task[:32])

    def fits(other: LoadedModel, more: int) -> None:
        require_compatible(
            student, other, max_tokens=config.limits.max_tokens, teacher_extra_tokens=more,
            chat_format=config.chat_format,
        )  # fmt: skip

    in_vllm: list[VLLMTeacher] = []

    @cache
    def single(name: str) -> Single:
        longest = config.limits.max_tokens + extra
        if is_url(name):
            return _served(name, config, chat, prompt, longest)
        if config.teacher_engine is TeacherEngine.VLLM:
            if teacher is not None:
                raise ConfigError("teacher_engine=vllm loads the teacher by its name; hand no loaded model in")
            fits(load_outline(name), extra + 1)  # vLLM samples a token when it scores
            in_vllm.append(_in_vllm(name, config, chat, prompt, longest + 1))
            return in_vllm[-1]
        loaded = model(name)
        fits(loaded, extra)
        return LocalTeacher(loaded, vocab_size=chat.vocab_size, prompt=prompt, **options)

    members = {name: single(name) for name in (config.teacher, *config.teacher_mixture)}
    if config.teacher_mixture:
        general = _mixture(config, members, device, chat.vocab_size)
    else:
        general = _remembering(config, members[config.teacher])
    scorer = general
    if config.teacher_routes:
        _require_known_routes(config, task)
        others = {name: _remembering(config, single(model)) for name, model in config.teacher_routes.items()}
        scorer = RoutedTeacher(general, others, NameRoute(others, find, config.tools))
    return Teachers(members, scorer, teacher_chat, extra, in_vllm)


def _mixture(config: OPDConfig, members: Mapping[str, Single], device: torch.device, vocab_size: int) -> Teacher:
    """The members as one. Where log-probs suffice, each remembers its own, so that weights can change."""
    weights = [config.teacher_mixture[name] for name in members]
    if not config.needs_distributions:
        return Mixture([_remembering(config, one) for one in members.values()], weights)
    local = [one for one in members.values() if isinstance(one, LocalTeacher)]
    mixture = LocalMixture(local, weights, device=device, vocab_size=vocab_size, temperature=config.temperature)
    if config.teacher_cache is None:
        return mixture
    identity = " + ".join(f"{weight} of {_identity(config, one)}" for weight, one in zip(weights, local, strict=True))
    return CachedTeacher(mixture, config.teacher_cache, identity, mixture.rows)


def _remembering(config: OPDConfig, one: Single) -> Teacher:
    if config.teacher_cache is None or not isinstance(one, LocalTeacher):
        return one
    return CachedTeacher(one, config.teacher_cache, _identity(config, one), one.rows)


def _identity(config: OPDConfig, one: LocalTeacher) -> str:
    return f"{weights_hash(one.loaded.model)} at temperature {config.temperature}"


def _served(urls: str, config: OPDConfig, chat: TemplateFormat, prompt: Prompt | None, longest: int) -> ServerTeacher:
    """A teacher behind servers, which have been probed."""
    client = client_of(urls, config.concurrent_episodes)
    teacher = ServerTeacher(client, vocab_size=chat.vocab_size, prompt=prompt)
    if teacher.model.max_context < longest + 1:
        raise ConfigError(
            f"the teacher's server has a context of {teacher.model.max_context}, and episodes with its prompt may have "
            f"{longest} tokens and one that it samples; raise --max-model-len, or lower limits.max_tokens"
        )
    probe_servers(client, chat)
    client.on_return = same_scores(client, chat)
    if config.needs_distributions:
        try:
            score_tokens(client, teacher.model, chat.render_prompt([user("?")])[:2], [1], config.topk_tokens)
        except RequestRefused as error:
            raise ConfigError(
                f"the teacher's server does not give topk_tokens={config.topk_tokens} ({error}); start it with "
                f"--max-logprobs {config.topk_tokens}, or lower topk_tokens"
            ) from error
    return teacher


def _in_vllm(name: str, config: OPDConfig, chat: TemplateFormat, prompt: Prompt | None, context: int) -> VLLMTeacher:
    """A teacher that vLLM runs in this process, which has been probed."""
    engine = VLLMEngine(
        name, chat.stop_token_ids, chat.vocab_size, capacity=config.concurrent_episodes, max_context=context,
        dtype=config.teacher_dtype, **{"max_logprobs": max(20, config.topk_tokens), **config.vllm_options},
    )  # fmt: skip
    probe_vllm(engine, chat)
    return VLLMTeacher(engine, vocab_size=chat.vocab_size, prompt=prompt)


def _require_known_routes(config: OPDConfig, task: Task) -> None:
    """Refuses a route that no problem could take."""
    offered = config.tools if config.tools is not None else task.tools
    known = [task.name, *(tool if isinstance(tool, str) else tool.name for tool in offered), *list_tools()]
    for name in config.teacher_routes:
        if name not in known:
            raise ConfigError(f"teacher_routes: {unknown('tool or task of this run', name, dict.fromkeys(known))}")
