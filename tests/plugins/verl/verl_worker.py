"""A whole AgentLoopWorker of verl on a CPU, a task, and a policy that the kit and verl play alike."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl import trainer
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.protocol import DataProto
from verl.utils.dataset.rl_dataset import collate_fn
from verl.workers.rollout.replica import TokenOutput

from opd_env.engines.base import Completion, Engine, Request
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.rollouts import rollout
from opd_env.episode.trajectory import Trajectory
from opd_env.formats import get_format
from opd_env.messages import Message, assistant, user
from opd_env.plugins.verl.examples import example_rows
from opd_env.tasks import Example, Grade, Task, grade_number, load_task, register_task
from opd_env.tools import Tool, ToolError, ToolErrorKind, tool
from tests.tiny import tiny_llama, tiny_tokenizer

CHAT = get_format(tiny_tokenizer())
TASK = "doubles_of_verl"
PROMPT, RESPONSE = 200, 1500
"""Tokens that verl is told to leave to a prompt and to a response."""


@tool
def broken() -> str:
    """Fails by no fault of the student."""
    raise ToolError(ToolErrorKind.SANDBOX, "no sandbox is left")


@register_task(TASK)
class Doubles(Task):
    """What is 2 times the index? Of odd ones the user asks twice."""

    version = "1"
    tools: Sequence[str | Tool] = ("calculator", broken)

    def __len__(self) -> int:
        return 40

    def example(self, index: int) -> Example:
        return Example(f"double-{index}", (user(f"Double {index}?"),), str(2 * index))

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        return grade_number(answer, example.answer)

    def next_user(self, example: Example, turns: Sequence[Message]) -> Message | None:
        asked = sum(message["role"] == "user" for message in turns)
        return user("Sure?") if int(example.answer) % 4 and not asked else None


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TURNS = (
    call("calculator", '{"expression": "2*3"}'),
    "Hm. " + call("calculator", '{"expression": "1/0"}') + "\n" + call("calculator", '{"expression": "7"}'),
    call("calculator", '{"expresion": "1"}'),
    call("calculater", "{}"),
    "<tool_call>\n{not json\n</tool_call>",
    "<tool_call>",
    "The answer is 6.",
    "The answer is 10.",
)
"""What a student may do: right and wrong calls, calls that cannot be read, and answers."""


def policy(prompt: Sequence[int], max_tokens: int) -> tuple[list[int], list[float]]:
    """A turn and its log-probs: at random, but always the same after the same tokens."""
    rng = random.Random(repr(list(prompt)))
    ids = CHAT.render_assistant(assistant(rng.choice(TURNS)))[:max_tokens]
    return ids, [-rng.random() for _ in ids]


class PolicyEngine(Engine):
    """The policy as the kit's engine."""

    capacity = 1000

    def __init__(self) -> None:
        self._queue: list[Request] = []

    def submit(self, request: Request) -> None:
        self._queue.append(request)

    def step(self) -> list[Completion]:
        queue, self._queue = self._queue, []
        turns = [(request, *policy(request.token_ids, request.params.max_tokens)) for request in queue]
        return [
            Completion(one.episode, ids, logprobs, truncated=ids[-1] not in CHAT.stop_token_ids)
            for one, ids, logprobs in turns
        ]

    @property
    def busy(self) -> bool:
        return bool(self._queue)

    def release(self, episode: int) -> None:
        pass


class Server:
    """What stands for verl's client of its servers: the policy, or what a test says; keeps the requests."""

    def __init__(self, respond: Callable[[list[int], dict[str, Any]], Mapping[str, Any]] | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self._respond = respond

    async def generate(self, request_id: str, *, prompt_ids: Any, sampling_params: Any, **more: Any) -> TokenOutput:
        self.requests.append({"id": request_id, "prompt_ids": prompt_ids, **sampling_params, **more})
        number = len(self.requests)
        await asyncio.sleep(0)
        steps = {"global_steps": 7, "min_global_steps": number, "max_global_steps": number}
        output: dict[str, Any] = {"stop_reason": "completed", "num_preempted": 1, "extra_fields": steps}
        if self._respond is not None:
            return TokenOutput(**output | dict(self._respond(prompt_ids, sampling_params)))
        ids, logprobs = policy(prompt_ids, sampling_params["max_tokens"])
        return TokenOutput(**output, token_ids=ids, log_probs=logprobs if sampling_params["logprobs"] else None)


def verl_config(folder: Path, *options: str, tokenizer: Any = None) -> Any:
    """verl's own configuration of a run, for the tiny model and a tokenizer, which are saved in ``folder``."""
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    words = [
        f"actor_rollout_ref.model.path={folder}",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.calculate_log_probs=true",
        f"data.max_prompt_length={PROMPT}",
        f"data.max_response_length={RESPONSE}",
        *options,
    ]
    with initialize_config_dir(str(Path(trainer.__file__).parent / "config"), version_base=None):
        config = compose("ppo_trainer", overrides=words)
    OmegaConf.resolve(config)
    return config


def batch_of(rows: Sequence[Mapping[str, Any]], **meta: Any) -> DataProto:
    """Rows of a data file as verl's data set and trainer hand them to its workers."""
    items = [{**row, "raw_prompt": row["prompt"], "index": row["extra_info"]["index"]} for row in rows]
    batch = DataProto.from_single_dict(collate_fn(items))
    batch.meta_info = {"global_steps": 1, "validate": False, **meta}
    return batch


def play(config: Any, server: Any, rows: Sequence[Mapping[str, Any]], **options: Any) -> DataProto:
    """What verl's worker makes of these rows."""
    teacher = options.pop("teacher", None)

    async def run() -> DataProto:
        worker = AgentLoopWorker(config, server, teacher and {"default": teacher})
        return await worker.generate_sequences(batch_of(rows, **options))

    return asyncio.run(run())


ROWS = example_rows(TASK)


def expected(index: int, response: int = RESPONSE, task: str = TASK, **limits: int) -> Trajectory:
    """The kit's own rollout of an example, with the limits that verl's configuration means for it."""
    prompt = rollout(load_task(task), PolicyEngine(), CHAT, indices=[index]).trajectories[0].turns[0].start
    budget = RolloutLimits(**{"max_tokens": prompt + response, "max_turn_tokens": response} | limits)
    return rollout(load_task(task), PolicyEngine(), CHAT, indices=[index], limits=budget).trajectories[0]


def response_of(batch: Any, row: int) -> slice:
    return slice(0, int(batch.batch["attention_mask"][row, batch.batch["prompts"].shape[1] :].sum()))


def assert_same(batch: Any, row: int, trajectory: Trajectory) -> None:
    """A row of verl's batch is the trajectory: tokens, mask, log-probs, score; and padding is nowhere marked."""
    start, part = trajectory.turns[0].start, response_of(batch, row)
    prompt = batch.batch["prompts"][row]
    assert prompt[len(prompt) - start :].tolist() == trajectory.token_ids[:start].tolist()
    assert batch.batch["attention_mask"][row, : len(prompt)].sum() == start
    assert batch.batch["responses"][row, part].tolist() == trajectory.token_ids[start:].tolist()
    mask = batch.batch["response_mask"][row]
    assert mask[part].tolist() == trajectory.sampled[start:].tolist()
    assert mask[part.stop :].sum() == 0
    logprobs = batch.batch["rollout_log_probs"][row]
    assert logprobs[part].tolist() == trajectory.logprobs[start:].tolist()
    assert ((logprobs != 0) == mask.bool()).all(), "the policy's log-probs are never 0"
    scores = batch.batch["rm_scores"][row]
    assert scores[part.stop - 1] == scores.sum() == trajectory.correct
    assert batch.non_tensor_batch["stop_reason"][row] == trajectory.stop_reason


def distilling(config: Any, loss_mode: str) -> Any:
    config = config.copy()
    config.distillation.enabled = True
    config.distillation.distillation_loss.update({"loss_mode": loss_mode, "use_policy_gradient": True})
    config.distillation.teacher_models.teacher_model.update({"key": "default", "model_path": "teacher"})
    return config


def failing(config: Any, row: dict[str, Any] = ROWS[0], server: Server | None = None, **options: Any) -> BaseException:
    """What verl's worker raises; its trainer logs it and leaves the prompt out."""
    with pytest.raises(Exception) as caught:
        play(config, server or Server(), [row], **options)
    cause = caught.value
    while cause.__cause__ is not None:  # hydra wraps what an agent loop's constructor raises
        cause = cause.__cause__
    return cause
