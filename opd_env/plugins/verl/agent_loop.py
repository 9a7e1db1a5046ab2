"""verl's agent loop ``opd_env``: plays one example of a task through the kit's own episodes.

Worked example: a row of the data file (``examples`` writes them) names the loop and the example::

    agent_name: opd_env
    extra_info: {task: gsm8k, split: train, options: "{}", version: "1", index: 17, id: train-17}

and verl gets the tokens, the mask of what the student sampled, its log-probs, the grade as score, and metrics. verl's
servers sample, token ids in and out; prompts, tools, limits, spans and grading are those of ``opd_env.rollout``. The
response has at most ``data.max_response_length`` tokens, a prompt over ``data.max_prompt_length`` is an error, and the
other limits may be set in a file that verl's ``agent_loop_config_path`` names::

    - name: opd_env
      _target_: opd_env.plugins.verl.EpisodeLoop
      limits: {max_turns: 6, max_turn_tokens: 512, max_seconds: 120}

An episode that fails by no fault of the student raises: verl's trainer logs that and leaves its prompt out of the step.

Test it alone: ``pytest tests/plugins/verl/test_agent_loop.py`` (needs verl)
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, register

from opd_env.engines.base import Completion, Request
from opd_env.episode.env import ToolEnv
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.play import EpisodePlay
from opd_env.episode.trajectory import Trajectory
from opd_env.errors import UserError
from opd_env.formats import ChatFormat, get_format
from opd_env.settings.fields import build
from opd_env.tasks import Task, load_task

AGENT_NAME = "opd_env"
_THREADS = ThreadPoolExecutor(64, thread_name_prefix="opd-env-tool")
"""So many episodes of one worker run tools at the same time; the others wait their turn."""

Result = TypeVar("Result")


@register(AGENT_NAME)
class EpisodeLoop(AgentLoopBase):  # type: ignore[misc]  # verl has no types
    """Plays one episode; verl makes one for every row and sample.

    Args:
        arguments, options: what verl gives to an agent loop.
        limits: fields of ``RolloutLimits``. By default a turn may take the whole response, and
            ``multi_turn.max_assistant_turns``, if it is set, is the number of turns.
        chat_format: name of the chat format; by default it is found from the tokenizer's template.

    Raises:
        UserError: verl is told to apply the chat template with arguments, or to distil from a truncated distribution.
    """

    def __init__(
        self, *arguments: Any, limits: Mapping[str, Any] | None = None, chat_format: str | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        rollout = self.rollout_config
        _check_sampling(self.config)
        if self.apply_chat_template_kwargs:
            raise UserError(
                f"data.apply_chat_template_kwargs={dict(self.apply_chat_template_kwargs)} has no effect on the agent "
                f"loop {AGENT_NAME}; leave it out, and write what it would choose into the chat template"
            )
        self._prompt_length, self._response_length = int(rollout.prompt_length), int(rollout.response_length)
        whole = self._prompt_length + self._response_length
        chosen: dict[str, Any] = {"max_tokens": min(whole, rollout.max_model_len or whole)}
        chosen["max_turn_tokens"] = min(self._response_length, chosen["max_tokens"])
        if rollout.multi_turn.max_assistant_turns:
            chosen["max_turns"] = int(rollout.multi_turn.max_assistant_turns)
        self._limits = build(RolloutLimits, {**chosen, **(limits or {})})
        self._chat = _chat(self.tokenizer, chat_format)

    async def run(
        self, sampling_params: dict[str, Any], *, extra_info: Mapping[str, Any], priority: int = 0, **_: Any
    ) -> AgentLoopOutput:
        """Plays the episode of a row.

        Args:
            sampling_params: temperature and truncation, as verl chose them.
            extra_info: which example, see the module.
            priority: of the requests, as vLLM schedules them.

        Raises:
            UserError: the row does not fit the installed task, the prompt is too long, or the chat template would
                rewrite what was sampled.
            RuntimeError: a tool or a server failed.
        """
        shelf = _shelf(extra_info["task"], extra_info["split"], extra_info["options"], self._limits, self._chat)
        env = shelf.take()
        try:
            play = await _in_thread(partial(self._open, env, extra_info))
            server = _Server(self.server_manager, self._request_id(priority), sampling_params, priority, self._chat)
            request = play.ask()
            while request is not None:
                request = await _in_thread(partial(_take, play, await server.sample(request)))
        except BaseException:
            env.close()
            raise
        shelf.idle.append(env)
        if play.trajectory is None:
            raise RuntimeError(f"{_named(extra_info)} ended without a trajectory")
        # An advantage estimator of the kit reads log u as the rewards, to which verl would add the score.
        scored = not _is_ours(self.config.algorithm.adv_estimator)
        return server.output(play.trajectory, float(play.trajectory.correct) if scored else 0.0)

    def _open(self, env: ToolEnv, row: Mapping[str, Any]) -> EpisodePlay:
        play = EpisodePlay(env, self._chat, int(row["index"]))
        if (str(row["id"]), str(row["version"])) != (play.example.id, env.task.version):
            raise UserError(
                f"{_named(row)} was written as example {row['id']!r} of version {row['version']}, but here it is "
                f"{play.example.id!r} of version {env.task.version}; write the data file again"
            )
        prompt = play.recorder.context_length
        if prompt > self._prompt_length or prompt >= play.max_tokens:
            raise UserError(
                f"the prompt of {_named(row)} has {prompt} tokens, tools included; data.max_prompt_length is "
                f"{self._prompt_length} and the episode's limit {play.max_tokens}: raise them, or leave the example out"
            )
        play.max_tokens = min(play.max_tokens, prompt + self._response_length)
        return play

    def _request_id(self, priority: int) -> str:
        """Names the episode to verl's load balancer, which keeps it on the server that has its prefix cached."""
        return f"det-{int(priority)}" if self.rollout_config.full_determinism else uuid4().hex


@dataclass
class _Server:
    """Samples the turns of one episode, and keeps what verl wants to know of them."""

    manager: Any
    request_id: str
    sampling_params: Mapping[str, Any]
    priority: int
    chat: ChatFormat
    outputs: list[Any] = field(default_factory=list)

    async def sample(self, request: Request) -> Completion:
        most = request.params.max_tokens
        params = {**self.sampling_params, "max_tokens": most, "stop_token_ids": list(self.chat.stop_token_ids)}
        output = await self.manager.generate(
            request_id=self.request_id,
            prompt_ids=list(request.token_ids),
            sampling_params=params,
            priority=int(self.priority),
        )
        ids = list(output.token_ids)
        ended = bool(ids) and ids[-1] in self.chat.stop_token_ids
        if output.stop_reason in ("aborted", "abort"):
            raise RuntimeError("the server gave a turn up before its end")
        # SGLang leaves the last place of the context free.
        if len(ids) > most or (not ended and len(ids) < max(most - 1, 1)):
            raise RuntimeError(
                f"the server ended a turn after {len(ids)} of {most} tokens, with {ids[-1:]}, which is none of the "
                f"stop tokens {self.chat.stop_token_ids}"
            )
        self.outputs.append(output)
        logprobs = [0.0] * len(ids) if output.log_probs is None else list(output.log_probs)
        return Completion(request.episode, ids, logprobs, truncated=not ended)

    def output(self, trajectory: Trajectory, score: float) -> AgentLoopOutput:
        """What verl learns from: the first row, which is the whole episode unless its student's spelling of a turn made
        the chat template rewrite the conversation. Sampled tokens of further rows are left out, and counted.
        """
        prompt, row = trajectory.turns[0].start, trajectory.rows[0]
        response = slice(prompt, row.stop)
        told = all(output.log_probs is not None for output in self.outputs)
        preempted = [output.num_preempted for output in self.outputs]
        return AgentLoopOutput(
            prompt_ids=trajectory.token_ids[:prompt].tolist(),
            response_ids=trajectory.token_ids[response].tolist(),
            response_mask=trajectory.sampled[response].astype(int).tolist(),
            response_logprobs=trajectory.logprobs[response].tolist() if told else None,
            reward_score=score,
            num_turns=2 * len(trajectory.turns),
            metrics=AgentLoopMetrics(
                generate_sequences=sum(turn.generate_seconds for turn in trajectory.turns),
                tool_calls=sum(turn.tool_seconds for turn in trajectory.turns),
                num_preempted=-1 if None in preempted else sum(preempted),
            ),
            extra_fields={
                **self.outputs[-1].extra_fields,
                "min_global_steps": self.outputs[0].extra_fields.get("min_global_steps"),
                "turn_scores": [],
                "tool_rewards": [],
                "reward_extra_info": _told(trajectory),
            },
        )


def _check_sampling(config: Any) -> None:
    """Refuses to sample otherwise than the advantages of ``estimators`` assume."""
    rollout, distillation = config.actor_rollout_ref.rollout, config.distillation
    loss = distillation.distillation_loss.loss_mode if distillation.enabled else config.algorithm.adv_estimator
    drawn = {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k}
    whole = drawn["temperature"] == 1 and drawn["top_p"] == 1 and drawn["top_k"] in (-1, 0)
    if _is_ours(loss) and not whole:
        raise UserError(
            f"{loss} needs samples from the whole distribution of the student, but actor_rollout_ref.rollout has "
            f"{drawn}; set temperature=1, top_p=1 and top_k=-1"
        )


def _is_ours(name: Any) -> bool:
    return str(name).startswith("opd_")


def _told(trajectory: Trajectory) -> dict[str, Any]:
    """What verl logs beside the score, and averages in validations: the same names for every task."""
    failed = [call.error for call in trajectory.calls if call.error is not None]
    return {
        "acc": float(trajectory.correct),
        "finished": float(trajectory.stop_reason.terminated),
        "sampled_tokens": float(trajectory.num_sampled),
        "calls": float(len(trajectory.calls)),
        "failed_calls": float(len(failed)),
        "left_out_tokens": float(trajectory.sampled[trajectory.rows[0].stop :].sum()),
        "stop_reason": str(trajectory.stop_reason),
    }


def _take(play: EpisodePlay, completion: Completion) -> Request | None:
    play.take(completion)
    return play.ask()


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['task']}/{row['split']} number {row['index']}"


async def _in_thread(work: Callable[[], Result]) -> Result:
    """Rendering, parsing, tools and grading take time; verl's event loop also serves all other episodes."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work)


@cache
def _chat(tokenizer: Any, name: str | None) -> ChatFormat:
    return get_format(tokenizer, name)


@dataclass
class _Shelf:
    """The environments of one task that no episode plays now: their tools' processes are kept."""

    task: Task
    limits: RolloutLimits
    chat: ChatFormat
    idle: list[ToolEnv] = field(default_factory=list)

    def take(self) -> ToolEnv:
        return self.idle.pop() if self.idle else ToolEnv(self.task, limits=self.limits, parse=self.chat.parse_text)


@cache
def _shelf(name: str, split: str, options: str, limits: RolloutLimits, chat: ChatFormat) -> _Shelf:
    task = load_task(name, split, **json.loads(options))
    users = type(task).next_user is not Task.next_user
    for note in chat.not_append_only:
        if users or note.startswith("tool results"):
            raise UserError(
                f"task {name!r} cannot be played by verl with this chat template, which rewrites the conversation: "
                f"{note}. verl's distillation scores one sequence per episode; train with `opd-env train`, which "
                "learns from several, or with a template that only appends"
            )
    return _Shelf(task, limits, chat)
