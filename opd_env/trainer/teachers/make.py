"""Builds a run's teachers from its settings: what they read, whom each problem is routed to, what is known already.

Worked example::

    teachers = make_teachers(settings.model, Needs(max_tokens=2048), [task, eval_task], chat, student, device)
    teachers.scorer.score(trajectories)

Test it alone: ``pytest tests/trainer/run/test_setup.py tests/trainer/teachers/test_routing.py``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from opd_env.engines.models import LoadedModel, load_model, load_outline, weights_hash
from opd_env.engines.probe import probe_servers, probe_vllm, same_scores
from opd_env.engines.servers.client import RequestRefused, client_of
from opd_env.engines.servers.protocol import score_tokens
from opd_env.engines.servers.transport import is_url
from opd_env.engines.vllm import VLLMEngine
from opd_env.episode.trajectory import Trajectory
from opd_env.errors import unknown
from opd_env.formats import ChatFormat, TemplateFormat
from opd_env.messages import user
from opd_env.settings.fields import ConfigError
from opd_env.tasks import Task
from opd_env.tools import list_tools
from opd_env.trainer.teachers.base import LocalTeacher, Prompt, Teacher
from opd_env.trainer.teachers.cache import CachedTeacher
from opd_env.trainer.teachers.cross_tokenizer import CrossTokenizerTeacher
from opd_env.trainer.teachers.fits import require_aligned, require_compatible
from opd_env.trainer.teachers.many import LocalMixture, NameRoute, RoutedTeacher, TeacherMixture
from opd_env.trainer.teachers.prompts import DemonstrationFormat, ExampleFinder, TaskPrompts, play_demonstrations
from opd_env.trainer.teachers.served import ServerTeacher, VLLMTeacher
from opd_env.trainer.teachers.settings import TeacherEngine, TeacherSettings

Single = LocalTeacher | ServerTeacher | VLLMTeacher
"""A teacher that is one model."""
_CHECKED_EPISODES = 16


@dataclass(frozen=True)
class Needs:
    """What a run asks of its teachers: on which episodes, and for what."""

    max_tokens: int
    """Of an episode, as the student reads it."""
    tools: tuple[str, ...] | None = None
    """On offer in the student's episodes; None: the task's own."""
    chat_format: str | None = None
    """Name of the student's format, where the settings give it."""
    temperature: float = 1.0
    """At which the student samples and the teachers are read."""
    topk_tokens: int | None = None
    """How many of a teacher's most likely tokens are asked for; None: log-probs of the sampled tokens will do."""
    seed: int = 0
    """Draws the demonstrations."""
    tokens_per_microbatch: int = 8192
    """Padded tokens that a local teacher reads at once."""
    concurrent_episodes: int = 64
    """Requests to servers, or rows in vLLM, at the same time."""
    vllm_options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of a ``vllm.LLM``."""


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
    settings: TeacherSettings,
    needs: Needs,
    tasks: Sequence[Task],
    chat: TemplateFormat,
    student: LoadedModel,
    device: torch.device,
    teacher: LoadedModel | None = None,
) -> Teachers:
    """Builds them.

    Args:
        settings: who teaches.
        needs: what for.
        tasks: the one trained on, then the one evaluated on.
        chat: the student's format.
        student: for the check that the teachers fit.
        device: where they compute.
        teacher: the model that ``settings.model`` names, if it is loaded already.

    Raises:
        ValueError: a name is unknown, or a model does not fit the student.
        ModelUnavailable: a model cannot be loaded.
    """
    task, find = tasks[0], ExampleFinder(tasks)

    def model(name: str) -> LoadedModel:
        home = torch.device("cpu") if settings.offload else device
        if teacher is not None and name == settings.model:
            teacher.model.to(home)
            return teacher
        return load_model(name, dtype=settings.dtype, device=home)

    options: dict[str, Any] = {
        "temperature": needs.temperature,
        "tokens_per_microbatch": needs.tokens_per_microbatch,
        "device": device,
    }
    if settings.cross_tokenizer:
        other = CrossTokenizerTeacher(model(settings.model), chat, find, needs.tools, **options)
        return Teachers({settings.model: other.local}, other, other.chat, 0)
    teacher_chat: ChatFormat = chat
    prompt, extra = None, 0
    if settings.demonstrations:
        played = play_demonstrations(task, chat, count=settings.demonstrations, tools=needs.tools, seed=needs.seed)
        teacher_chat = demonstrations = DemonstrationFormat(chat, played)
        extra = demonstrations.longest
        prompt = TaskPrompts(find, teacher_chat, needs.tools)
    if settings.sees_answer:
        plain = TaskPrompts(find, teacher_chat, needs.tools)
        prompt = TaskPrompts(find, teacher_chat, needs.tools, answer=True)
        extra += max(len(prompt.render(task, one)) - len(plain.render(task, one)) for one in task[:32])

    def fits(other: LoadedModel, more: int) -> None:
        require_compatible(
            student, other, max_tokens=needs.max_tokens, teacher_extra_tokens=more,
            chat_format=needs.chat_format,
        )  # fmt: skip

    in_vllm: list[VLLMTeacher] = []

    @cache
    def single(name: str) -> Single:
        longest = needs.max_tokens + extra
        if is_url(name):
            return _served(name, needs, chat, prompt, longest)
        if settings.engine is TeacherEngine.VLLM:
            if teacher is not None:
                raise ConfigError("teacher.engine=vllm loads the teacher by its name; hand no loaded model in")
            fits(load_outline(name), extra + 1)  # vLLM samples a token when it scores
            in_vllm.append(_in_vllm(name, settings, needs, chat, prompt, longest + 1))
            return in_vllm[-1]
        loaded = model(name)
        fits(loaded, extra)
        return LocalTeacher(loaded, vocab_size=chat.vocab_size, prompt=prompt, **options)

    members = {name: single(name) for name in (settings.model, *settings.mixture)}
    if settings.mixture:
        general = _mixture(settings, needs, members, device, chat.vocab_size)
    else:
        general = _remembering(settings, needs, members[settings.model])
    scorer = general
    if settings.routes:
        _require_known_routes(settings, needs, task)
        others = {name: _remembering(settings, needs, single(model)) for name, model in settings.routes.items()}
        scorer = RoutedTeacher(general, others, NameRoute(others, find, needs.tools))
    return Teachers(members, scorer, teacher_chat, extra, in_vllm)


def _mixture(
    settings: TeacherSettings, needs: Needs, members: Mapping[str, Single], device: torch.device, vocab_size: int
) -> Teacher:
    """The members as one. Where log-probs suffice, each remembers its own, so that weights can change."""
    weights = [settings.mixture[name] for name in members]
    if needs.topk_tokens is None:
        return TeacherMixture([_remembering(settings, needs, one) for one in members.values()], weights)
    local = [one for one in members.values() if isinstance(one, LocalTeacher)]
    mixture = LocalMixture(local, weights, device=device, vocab_size=vocab_size, temperature=needs.temperature)
    if settings.cache is None:
        return mixture
    identity = " + ".join(f"{weight} of {_identity(needs, one)}" for weight, one in zip(weights, local, strict=True))
    return CachedTeacher(mixture, settings.cache, identity, mixture.rows)


def _remembering(settings: TeacherSettings, needs: Needs, one: Single) -> Teacher:
    if settings.cache is None or not isinstance(one, LocalTeacher):
        return one
    return CachedTeacher(one, settings.cache, _identity(needs, one), one.rows)


def _identity(needs: Needs, one: LocalTeacher) -> str:
    return f"{weights_hash(one.loaded.model)} at temperature {needs.temperature}"


def _served(urls: str, needs: Needs, chat: TemplateFormat, prompt: Prompt | None, longest: int) -> ServerTeacher:
    """A teacher behind servers, which have been probed."""
    client = client_of(urls, needs.concurrent_episodes)
    teacher = ServerTeacher(client, vocab_size=chat.vocab_size, prompt=prompt)
    if teacher.model.max_context < longest + 1:
        raise ConfigError(
            f"the teacher's server has a context of {teacher.model.max_context}, and episodes with its prompt may have "
            f"{longest} tokens and one that it samples; raise --max-model-len, or lower sampling.limits.max_tokens"
        )
    probe_servers(client, chat)
    client.on_return = same_scores(client, chat)
    if needs.topk_tokens is not None:
        try:
            score_tokens(client, teacher.model, chat.render_prompt([user("?")])[:2], [1], needs.topk_tokens)
        except RequestRefused as error:
            raise ConfigError(
                f"the teacher's server does not give objective.topk_tokens={needs.topk_tokens} ({error}); start it "
                f"with --max-logprobs {needs.topk_tokens}, or lower objective.topk_tokens"
            ) from error
    return teacher


def _in_vllm(
    name: str, settings: TeacherSettings, needs: Needs, chat: TemplateFormat, prompt: Prompt | None, context: int
) -> VLLMTeacher:
    """A teacher that vLLM runs in this process, which has been probed."""
    engine = VLLMEngine(
        name, chat.stop_token_ids, chat.vocab_size, capacity=needs.concurrent_episodes, max_context=context,
        dtype=settings.dtype, **{"max_logprobs": max(20, needs.topk_tokens or 0), **needs.vllm_options},
    )  # fmt: skip
    probe_vllm(engine, chat)
    return VLLMTeacher(engine, vocab_size=chat.vocab_size, prompt=prompt)


def _require_known_routes(settings: TeacherSettings, needs: Needs, task: Task) -> None:
    """Refuses a route that no problem could take."""
    offered = needs.tools if needs.tools is not None else task.tools
    known = [task.name, *(tool if isinstance(tool, str) else tool.name for tool in offered), *list_tools()]
    for name in settings.routes:
        if name not in known:
            raise ConfigError(f"teacher.routes: {unknown('tool or task of this run', name, dict.fromkeys(known))}")


def check_teacher(teachers: Teachers, trajectories: Sequence[Trajectory], untrained: str | None = None) -> None:
    """Applies ``require_aligned`` to the first episodes that a run plays, for every teacher that scores them.

    Args:
        teachers: of the run. Scores of a teacher with another tokenizer are sums over spans, and are left alone.
        trajectories: played before the first update of this process.
        untrained: the student's model, if the student is still as it was loaded; a teacher of that name is its copy.

    Raises:
        ValueError: the scores do not fit.
    """
    if isinstance(teachers.scorer, CrossTokenizerTeacher):
        return
    first = list(trajectories[:_CHECKED_EPISODES])
    for name, member in teachers.members.items():
        same_model = name == untrained and not teachers.extra_tokens
        require_aligned(name, first, member.score(first), same_model=same_model)
    require_aligned(teachers.scorer.name, first, teachers.scorer.score(first))
