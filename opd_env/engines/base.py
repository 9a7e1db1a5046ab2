"""What samples turns: the engine contract, and an engine that plays a script.

An engine batches whatever is ready. Callers hand in requests, call ``step`` until it returns completions, and may
hand in more in between, so that a finished or waiting episode never holds the others::

    engine.submit(Request(episode=7, token_ids=prompt, params=SamplingParams(max_tokens=64), seed=1))
    while engine.busy:
        for completion in engine.step():
            ...
    engine.release(7)       # the episode is over: forget its KV cache

Test it alone: ``pytest tests/engines/test_local.py``
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn: always from the whole vocabulary, as on-policy training needs it.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token. On-policy training needs 1."""
    max_tokens: int = 256
    """Longest turn, in tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"temperature={self.temperature} is outside 0 … 10")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}; a turn needs at least 1")


GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Request:
    """One turn to sample."""

    episode: int
    """Names the episode: its KV cache is kept from turn to turn until ``release``."""
    token_ids: Sequence[int]
    """The whole prefix. From turn to turn it grows; where a chat template rewrites the conversation, it begins anew."""
    params: SamplingParams
    seed: int = 0
    """Fixes this turn's random numbers, whatever else is in the batch."""


@dataclass(frozen=True)
class Completion:
    """A sampled turn."""

    episode: int
    token_ids: list[int]
    """The stop token is included when one was sampled."""
    logprobs: list[float]
    """Natural log-probs at the request's temperature (at 1 for greedy); one per token."""
    truncated: bool
    """The turn reached ``max_tokens`` without a stop token."""
    error: str | None = None
    """Why the turn could not be sampled, by no fault of the student; None when it was."""
    seconds: float | None = None
    """What the turn took, where the engine paused meanwhile for a busy server; None for all the time that passed."""


class Engine(ABC):
    """Samples turns for many episodes at once."""

    capacity: int
    """Episodes that can be open (submitted and not released) at the same time."""

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Queues a turn. An episode has at most one turn under way.

        Raises:
            ValueError: the prefix leaves no room for ``max_tokens`` in the model's context.
        """

    @abstractmethod
    def step(self) -> list[Completion]:
        """Works for a moment (a local engine: one token for every running turn); returns the turns that ended."""

    @property
    def side_by_side(self) -> int:
        """Turns that are worth sampling at the same time. Up to ``capacity``, more episodes are open while some wait
        for tools.
        """
        return self.capacity

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether any turn is queued or running."""

    @abstractmethod
    def release(self, episode: int) -> None:
        """Forgets an episode; a turn of it that is under way is dropped."""

    def cut(self, episode: int) -> None:
        """Ends an episode's turn early: a later ``step`` returns it, truncated, with the tokens sampled so far.

        An engine that cannot do that without losing tokens goes on to the end of the turn.
        """
        return

    def wake(self) -> None:
        """Makes a ``step`` that only waits return at once; other threads call it. A step that works need not."""
        return

    def update_weights(self, model: Any) -> None:
        """Takes over the weights of the student as they are now; the engine is idle.

        Args:
            model: a causal language model, or a PEFT wrapper of one. An engine that samples with this very object
                has nothing to do.
        """
        return

    def close(self) -> None:
        """Gives back what the engine holds outside this process."""
        return

    def generate(self, prefixes: Sequence[Sequence[int]], params: SamplingParams, seed: int = 0) -> list[Completion]:
        """Samples one turn after every prefix, in order. For scripts; rollouts use ``submit`` and ``step``."""
        if self.busy:
            raise RuntimeError("generate() needs an idle engine; other turns are under way")
        completions: dict[int, Completion] = {}
        waiting = list(enumerate(prefixes))[::-1]
        while waiting or self.busy:
            while waiting and len(prefixes) - len(waiting) - len(completions) < self.side_by_side:
                index, prefix = waiting.pop()
                self.submit(Request(-1 - index, prefix, params, seed=seed * 1_000_003 + index))
            for completion in self.step():
                index = -1 - completion.episode
                if completion.error is not None:
                    raise RuntimeError(f"prefix {index} could not be continued: {completion.error}")
                completions[index] = replace(completion, episode=index)
                self.release(completion.episode)
        return [completions[index] for index in range(len(prefixes))]


class AskingEngine(Engine):
    """What engines that ask servers have in common: threads wait for the answers, ``step`` for the first of them."""

    def __init__(self) -> None:
        self._tickets: dict[int, object] = {}
        """Of turns under way: what tells a turn from a later one of an episode of the same number."""
        self._ended: SimpleQueue[tuple[int, object, Completion | Exception] | None] = SimpleQueue()
        self._failure: Exception | None = None

    def _begin(
        self, episode: int, ask: Callable[[], Completion], in_a_thread: Callable[[Callable[[], None]], None]
    ) -> None:
        if episode in self._tickets:
            raise RuntimeError(f"episode {episode} has a turn under way already")
        ticket = self._tickets[episode] = object()

        def run() -> None:
            result: Completion | Exception
            try:
                result = ask()
            except Exception as error:  # raised where the caller waits: it must not die with this thread
                result = error
            self._ended.put((episode, ticket, result))

        in_a_thread(run)

    def step(self) -> list[Completion]:
        """Waits until a turn ends or ``wake`` is called; returns all turns that ended."""
        completions: list[Completion] = []
        ended = self._ended.get() if self._tickets and self._failure is None else None
        while self._failure is None:
            if ended is not None and self._tickets.get(ended[0]) is ended[1]:
                del self._tickets[ended[0]]
                if isinstance(ended[2], Exception):
                    self._failure = ended[2]
                    break
                completions.append(ended[2])
            try:
                ended = self._ended.get_nowait()
            except Empty:
                break
        if self._failure is not None and not completions:  # turns that ended before it are handed over first
            failure, self._failure = self._failure, None
            raise failure
        return completions

    @property
    def busy(self) -> bool:
        # A failure that has not been raised yet counts: callers stop at an idle engine.
        return bool(self._tickets) or self._failure is not None

    def wake(self) -> None:
        self._ended.put(None)

    def release(self, episode: int) -> None:
        """The answer to a turn under way is thrown away when it comes."""
        self._tickets.pop(episode, None)


class ScriptedEngine(Engine):
    """Plays turns that a function decides, with log-prob 0: for tests, experts and people at a keyboard.

    Args:
        respond: called with the request and the number of this episode's turn (from 0); returns the token ids
            of the turn. They are cut to the request's ``max_tokens``.
        stop_token_ids: a turn that does not end with one of these counts as truncated.
    """

    def __init__(self, respond: Callable[[Request, int], Sequence[int]], stop_token_ids: Sequence[int]) -> None:
        self.capacity = 1 << 30
        self._respond = respond
        self._stop = frozenset(stop_token_ids)
        self._turns: dict[int, int] = {}
        self._queue: list[Request] = []

    def submit(self, request: Request) -> None:
        self._queue.append(request)

    def step(self) -> list[Completion]:
        """Ends every queued turn."""
        queue, self._queue = self._queue, []
        return [self._play(request) for request in queue]

    @property
    def busy(self) -> bool:
        return bool(self._queue)

    def release(self, episode: int) -> None:
        self._turns.pop(episode, None)
        self._queue = [request for request in self._queue if request.episode != episode]

    def _play(self, request: Request) -> Completion:
        turn = self._turns.get(request.episode, 0)
        self._turns[request.episode] = turn + 1
        ids = list(self._respond(request, turn))[: request.params.max_tokens]
        return Completion(request.episode, ids, [0.0] * len(ids), truncated=not ids or ids[-1] not in self._stop)
