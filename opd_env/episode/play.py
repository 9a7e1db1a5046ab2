"""One episode under way, without an engine: what to sample next, and where that leads.

Worked example, of an episode whose turns ``sample`` draws::

    play = EpisodePlay(ToolEnv(task, parse=chat.parse_text), chat, index=0)
    while (request := play.ask()) is not None:
        play.take(sample(request))
    play.trajectory

The budgets of tokens are kept here (1 and 10 of ``opd_env.episode.limits``), so that whoever samples, a rollout or
another framework's loop, plays the same episodes.

Test it alone: ``pytest tests/episode/test_play.py tests/episode/test_rollouts.py``
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from opd_env.engines.base import Completion, Request, SamplingParams
from opd_env.episode.env import ToolEnv
from opd_env.episode.record import EpisodeRecorder, Recorder
from opd_env.episode.trajectory import StopReason, Trajectory
from opd_env.formats import ChatFormat, ParsedTurn
from opd_env.tasks import Example
from opd_env.tools import ToolErrorKind


class EpisodePlay:
    """Opens an episode and plays it turn by turn; ``trajectory`` is None until it is over.

    Args:
        env: its task and limits are the episode's; it plays no other one meanwhile.
        chat: the format of the student's tokenizer; None for a recorder that needs none.
        index: which example.
        sample: which of the episodes of this example.
        seed: the run's; this episode's random numbers follow from it, the example's id and ``sample``.
        sampling: temperature and truncation; ``env.limits.max_turn_tokens`` replaces its ``max_tokens``.
        key: names the episode in requests.
        recorder: called with the format, the opening messages and the schemas of the tools; another than the default
            for a student whose tokens nobody sees.
    """

    def __init__(
        self,
        env: ToolEnv,
        chat: ChatFormat | None,
        index: int,
        *,
        sample: int = 0,
        seed: int = 0,
        sampling: SamplingParams | None = None,
        key: int = 0,
        recorder: Callable[..., Recorder] = EpisodeRecorder,
    ) -> None:
        self.env, self.key, self.sample = env, key, sample
        _, info = env.reset(options={"index": index})
        self.example: Example = info["example"]
        self.recorder = recorder(chat, info["messages"], info["tools"])
        self.max_tokens = env.limits.max_tokens
        """Tokens of the whole episode. Callers may lower it before the first turn."""
        self.trajectory: Trajectory | None = None
        self.sampling = False
        """A turn is being sampled."""
        self.cut = False
        """Whoever samples was told to end the turn, for the episode's time is up."""
        self._params = sampling or SamplingParams()
        self._run_seed, self._seed = seed, episode_seed(seed, self.example.id, sample)
        self._turn = 0
        self._started = self._asked = time.perf_counter()

    def ask(self) -> Request | None:
        """The next turn to sample; None when the episode is over, also because no room is left for a turn."""
        if self.trajectory is None and self.recorder.context_length >= self.max_tokens:
            self._truncate(StopReason.EPISODE_LENGTH)
        if self.trajectory is not None:
            return None
        room = self.max_tokens - self.recorder.context_length
        params = replace(self._params, max_tokens=min(room, self.env.limits.max_turn_tokens))
        self._asked, self.sampling = time.perf_counter(), True
        # A turn has at most max_tokens random numbers; turns of one episode must not share them.
        return self.recorder.request(self.key, params, self._seed * 1_000_003 + self._turn)

    def sampled(self, completion: Completion) -> ParsedTurn | None:
        """Takes the turn that was asked for: what ``env.step`` and then ``played`` are due for; None when it was cut
        and the episode is over.
        """
        self._turn += 1
        self.sampling = False
        waited = time.perf_counter() - self._asked
        seconds = waited if completion.seconds is None else completion.seconds
        self.env.extend(waited - seconds)
        parsed = self.recorder.sampled(completion, seconds)
        if not completion.truncated:
            return parsed
        if self.recorder.context_length >= self.max_tokens:
            self._truncate(StopReason.EPISODE_LENGTH)
        else:
            short = len(completion.token_ids) < self.env.limits.max_turn_tokens
            self._truncate(StopReason.TIME if self.cut and self.env.overdue() and short else StopReason.TURN_LENGTH)
        return None

    def played(self, parsed: ParsedTurn, info: dict[str, Any], seconds: float) -> None:
        """Takes what ``env.step(parsed.text)`` said.

        Raises:
            RuntimeError: a tool failed by no fault of the student.
        """
        broken = [played.result for played in info["calls"] if played.result.error is ToolErrorKind.SANDBOX]
        if broken:
            raise RuntimeError(f"tool {broken[0].name!r} failed by no fault of the student: {broken[0].content}")
        self.recorder.played(parsed, info["calls"], seconds)
        if "stop_reason" in info:
            self._end(info["stop_reason"], info["answer"], info["grade"])
        elif not self.recorder.answered(info["messages"], self.max_tokens):
            self._truncate(StopReason.EPISODE_LENGTH)

    def take(self, completion: Completion) -> None:
        """Takes the turn that was asked for and runs its calls, in this thread.

        Raises:
            RuntimeError: as ``played``.
        """
        parsed = self.sampled(completion)
        if parsed is not None:
            before = time.perf_counter()
            *_, info = self.env.step(parsed.text)
            self.played(parsed, info, time.perf_counter() - before)

    def _truncate(self, reason: StopReason) -> None:
        """Ends the episode because a budget of tokens or its time ran out."""
        self._end(reason, None, self.env.truncate(reason))

    def _end(self, reason: StopReason, answer: str | None, grade: Any) -> None:
        self.trajectory = self.recorder.finish(
            self.example,
            grade,
            reason,
            answer,
            task=self.env.task.name,
            sample=self.sample,
            seed=self._run_seed,
            seconds=time.perf_counter() - self._started,
        )


def episode_seed(seed: int, example_id: str, sample: int) -> int:
    """A 63-bit seed that depends on nothing but the run's seed, the example and the sample's number."""
    digest = hashlib.sha256(f"{seed}/{example_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
