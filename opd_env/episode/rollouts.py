"""Plays many episodes at once: the engine samples turns, environments run the tools, recorders keep the tokens.

Worked example::

    chat = get_format(loaded.tokenizer)
    engine = LocalEngine(loaded.model, chat.stop_token_ids, chat.vocab_size)
    result = rollout(load_task("arithmetic"), engine, chat, indices=range(64), seed=1)
    result.trajectories[0].correct

Episodes are independent: an episode that waits for a slow tool does not hold the others. A failure of the
kit itself (never of a student or a tool) is recorded as an ``EpisodeError``, counted, and raised under pytest.

Test it alone: ``pytest tests/episode/test_rollouts.py``
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from opd_env.engines.base import Completion, Engine, SamplingParams
from opd_env.episode.env import ToolEnv
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.play import EpisodePlay
from opd_env.episode.record import EpisodeRecorder, Recorder
from opd_env.episode.trajectory import Trajectory
from opd_env.formats import ChatFormat, ParsedTurn, parse_hermes
from opd_env.tasks import Task
from opd_env.tools import Tool, Toolbox

_LOOK_AGAIN_S = 0.1
"""While nothing but tools runs: how often to see whether the rollout was cancelled."""


@dataclass(frozen=True)
class EpisodeError:
    """An episode that the kit failed to finish. It is not the student's fault and does not enter any rate."""

    example_id: str
    sample: int
    message: str


class RolloutCancelled(Exception):
    """The rollout was called off; what has finished was handed to ``on_finished``."""


@dataclass
class RolloutResult:
    """Finished episodes in the order of ``indices`` and samples, and what they took."""

    trajectories: list[Trajectory]
    errors: list[EpisodeError] = field(default_factory=list)
    seconds: float = 0.0
    """Wall time of the whole rollout."""
    generate_seconds: float = 0.0
    """Wall time inside the engine."""
    tool_seconds: float = 0.0
    """Summed over episodes; tools of different episodes overlap."""
    tail_seconds: float = 0.0
    """The last part of the rollout, when fewer than a tenth of the episodes were not finished."""

    @property
    def sampled_tokens(self) -> int:
        """Tokens that the student chose."""
        return sum(trajectory.num_sampled for trajectory in self.trajectories)


def rollout(
    task: Task,
    engine: Engine,
    chat: ChatFormat | None,
    *,
    indices: Iterable[int] | None = None,
    samples: int = 1,
    episodes: Iterable[tuple[int, int]] | None = None,
    tools: Sequence[str | Tool] | None = None,
    limits: RolloutLimits | None = None,
    sampling: SamplingParams | None = None,
    seed: int = 0,
    tool_workers: int = 8,
    on_finished: Callable[[Trajectory], None] | None = None,
    cancel: threading.Event | None = None,
    recorder: Callable[..., Recorder] = EpisodeRecorder,
) -> RolloutResult:
    """Plays ``samples`` episodes of every example.

    Args:
        task: the problems.
        engine: samples the student's turns; idle.
        chat: the format of the student's tokenizer; None for a student whose tokens nobody sees.
        indices: which examples; all by default. An index that stands again gets further samples of its example.
        samples: episodes of each.
        episodes: pairs of index and sample number, instead of ``indices`` and ``samples``: for callers that share
            the episodes of a batch, or play some of them later.
        tools: what the student may call; by default the task's own.
        limits: budgets; ``limits.max_turn_tokens`` replaces ``sampling.max_tokens``.
        sampling: temperature and truncation; by default temperature 1.
        seed: every episode's random numbers follow from it, the example's id and the sample's number.
        tool_workers: threads that run tools, so that a slow one holds only its own episode. With 0 they run in
            turn in this thread, which makes a rollout reproducible to the bit.
        on_finished: called with every trajectory as soon as it is finished, in this thread. What it raises ends the
            rollout: a trajectory that cannot be stored is no failure of its episode.
        cancel: another thread sets it, and calls ``engine.wake``, to end the rollout.
        recorder: see ``EpisodePlay``.

    Raises:
        RolloutCancelled: ``cancel`` was set.
        ValueError: ``episodes`` is given together with ``indices`` or ``samples``.
        UserError: a tool cannot work here: it needs a sandbox or an environment variable that is not there.
    """
    if episodes is None:
        episodes = _numbered(range(len(task)) if indices is None else indices, samples)
    elif indices is not None or samples != 1:
        raise ValueError("give episodes, or indices and samples, not both")
    with Toolbox(task.tools if tools is None else tools) as toolbox:
        toolbox.sandbox_levels()
    state = _Rollout(
        task, engine, chat, tools, limits or RolloutLimits(), sampling or SamplingParams(), seed, on_finished, recorder
    )
    return state.run(list(episodes), tool_workers, cancel or threading.Event())


@dataclass
class _Rollout:
    """The state of one call of ``rollout``."""

    task: Task
    engine: Engine
    chat: ChatFormat | None
    tools: Sequence[str | Tool] | None
    limits: RolloutLimits
    sampling: SamplingParams
    seed: int
    on_finished: Callable[[Trajectory], None] | None
    recorder: Callable[..., Recorder]
    finished: dict[int, Trajectory] = field(default_factory=dict)
    unreported: list[Trajectory] = field(default_factory=list)
    errors: list[EpisodeError] = field(default_factory=list)
    live: dict[int, EpisodePlay] = field(default_factory=dict)
    playing: dict[Future[Any], tuple[EpisodePlay, ParsedTurn, float]] = field(default_factory=dict)
    idle_envs: list[ToolEnv] = field(default_factory=list)
    generate_seconds: float = 0.0
    tool_seconds: float = 0.0

    def run(self, jobs: Sequence[tuple[int, int]], tool_workers: int, cancel: threading.Event) -> RolloutResult:
        started = tail_from = time.perf_counter()
        waiting = list(enumerate(jobs))[::-1]  # taken from its end
        pool = ThreadPoolExecutor(tool_workers, thread_name_prefix="opd-env-tool") if tool_workers else None
        try:
            while waiting or self.live:
                if cancel.is_set():
                    raise RolloutCancelled
                while waiting and self._has_room():
                    self._open(*waiting.pop())
                self._cut_overdue()
                if self.engine.busy:
                    before = time.perf_counter()
                    completions = self.engine.step()
                    self.generate_seconds += time.perf_counter() - before
                    for completion in completions:
                        episode = self.live[completion.episode]
                        if completion.error is not None:
                            self._fail(episode, completion.error)
                        else:
                            self._guard(episode, self._turn_sampled, completion, pool)
                elif self.playing:
                    wait(self.playing, timeout=_LOOK_AGAIN_S, return_when=FIRST_COMPLETED)
                for future in [future for future in self.playing if future.done()]:
                    episode, parsed, before = self.playing.pop(future)
                    self._guard(episode, self._turn_played, parsed, future.result, time.perf_counter() - before)
                self._report()
                if 10 * (len(waiting) + len(self.live)) >= len(jobs):  # the last time that this holds, the tail begins
                    tail_from = time.perf_counter()
        finally:
            for key in list(self.live):
                self.engine.release(key)
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)
            for env in [*self.idle_envs, *(episode.env for episode in self.live.values())]:
                env.close()
        ended = time.perf_counter()
        return RolloutResult(
            [self.finished[key] for key in sorted(self.finished)],
            self.errors,
            ended - started,
            self.generate_seconds,
            self.tool_seconds,
            ended - tail_from,
        )

    def _has_room(self) -> bool:
        """Whether to open a further episode. Those that wait for a tool leave their place to others."""
        at_work = len(self.live) - len(self.playing)
        return at_work < self.engine.side_by_side and len(self.live) < self.engine.capacity

    def _open(self, key: int, job: tuple[int, int]) -> None:
        index, sample = job
        parse = parse_hermes if self.chat is None else self.chat.parse_text
        env = (
            self.idle_envs.pop() if self.idle_envs else ToolEnv(self.task, self.tools, limits=self.limits, parse=parse)
        )
        episode = EpisodePlay(
            env, self.chat, index, sample=sample, seed=self.seed, sampling=self.sampling, key=key,
            recorder=self.recorder,
        )  # fmt: skip
        self.live[key] = episode
        self._guard(episode, self._go_on)

    def _go_on(self, episode: EpisodePlay) -> None:
        """Queues the episode's next turn, or closes it when it is over."""
        request = episode.ask()
        if request is not None:
            self.engine.submit(request)
        elif episode.trajectory is not None:
            self._close(episode)
            self.finished[episode.key] = episode.trajectory
            self.unreported.append(episode.trajectory)

    def _cut_overdue(self) -> None:
        """Ends turns that are being sampled when their episode's time is up: its slowest episode bounds a rollout."""
        for episode in self.live.values():
            if episode.sampling and not episode.cut and episode.env.overdue():
                episode.cut = True
                self.engine.cut(episode.key)

    def _turn_sampled(self, episode: EpisodePlay, completion: Completion, pool: ThreadPoolExecutor | None) -> None:
        parsed, now = episode.sampled(completion), time.perf_counter()
        if parsed is None:
            self._go_on(episode)
        elif pool is None or not parsed.calls:
            result = episode.env.step(parsed.text)
            self._turn_played(episode, parsed, lambda: result, time.perf_counter() - now)
        else:
            future = pool.submit(episode.env.step, parsed.text)
            self.playing[future] = (episode, parsed, now)
            future.add_done_callback(lambda _: self.engine.wake())  # an engine may be waiting for its own work

    def _turn_played(
        self, episode: EpisodePlay, parsed: ParsedTurn, outcome: Callable[[], Any], seconds: float
    ) -> None:
        *_, info = outcome()
        self.tool_seconds += seconds
        episode.played(parsed, info, seconds)
        self._go_on(episode)

    def _report(self) -> None:
        """Hands over what has finished; outside ``_guard``, so that a full disk is not taken for a bad episode."""
        finished, self.unreported = self.unreported, []
        if self.on_finished is not None:
            for trajectory in finished:
                self.on_finished(trajectory)

    def _close(self, episode: EpisodePlay) -> None:
        self.engine.release(episode.key)
        if self.live.pop(episode.key, None) is not None:
            self.idle_envs.append(episode.env)

    def _guard(self, episode: EpisodePlay, action: Callable[..., None], *args: Any) -> None:
        """Turns a failure of the kit into a counted error of one episode; under pytest it is raised."""
        try:
            action(episode, *args)
        except Exception as error:
            if "PYTEST_CURRENT_TEST" in os.environ:
                raise
            self._fail(episode, f"{type(error).__name__}: {error}")

    def _fail(self, episode: EpisodePlay, message: str) -> None:
        self._close(episode)
        self.errors.append(EpisodeError(episode.example.id, episode.sample, message))


def _numbered(indices: Iterable[int], samples: int) -> list[tuple[int, int]]:
    """Pairs of index and sample number; a repeated index goes on counting, for samples of one number are the same."""
    seen: Counter[int] = Counter()
    pairs = []
    for index in indices:
        pairs += [(index, seen[index] + sample) for sample in range(samples)]
        seen[index] += samples
    return pairs
