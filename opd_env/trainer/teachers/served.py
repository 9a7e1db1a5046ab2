"""Teachers that vLLM runs, behind servers or in this process: token ids in, log-probs of the sampled tokens out.

Worked example::

    teacher = ServerTeacher(HttpClient(["http://127.0.0.1:8000"]), vocab_size=chat.vocab_size)
    teacher = VLLMTeacher(VLLMEngine("Qwen/Qwen3-8B", …), vocab_size=chat.vocab_size)
    logprobs_N = teacher.score(trajectories)

Behind servers a row of an episode is one request; all of a batch are under way at once and the servers batch them. The
tokenizer of the teacher cannot be seen through the API: ``probe_servers`` compares what can be, and the user answers
for the rest.

What differs from a teacher that transformers runs: no hidden states (no ``full`` estimator), at most ``--max-logprobs``
(by default 20) tokens per position for ``topk``, temperature 1 only, and padding of the vocabulary, if the model has
any, keeps its tiny share of probability.

Test it alone: ``pytest tests/trainer/teachers/test_served.py``
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from opd_env.engines.base import Engine
from opd_env.engines.servers.client import HttpClient, RequestFailed
from opd_env.engines.servers.engine import HttpEngine
from opd_env.engines.servers.protocol import TokenScores, score_tokens, served_model
from opd_env.engines.vllm import VLLMEngine
from opd_env.episode.trajectory import Trajectory
from opd_env.errors import UserError
from opd_env.formats import ChatFormat
from opd_env.trainer.batch import Row, rows_of
from opd_env.trainer.math.logprobs import TopKScores
from opd_env.trainer.teachers.base import Prompt


class VLLMScores(ABC):
    """A ``TopKTeacher`` from what vLLM tells of tokens.

    Args:
        name: of the teacher, for messages.
        vocab_size: tokens of the student's tokenizer; one beyond it among the k most likely is refused.
        prompt: gives the prompt to read instead of the student's own; None keeps that.
    """

    def __init__(self, name: str, vocab_size: int, prompt: Prompt | None) -> None:
        self.name = name
        self._vocab_size = vocab_size
        self._prompt = prompt

    @abstractmethod
    def _ask(self, owned: Sequence[tuple[Trajectory, Row]], k: int) -> list[TokenScores]:
        """Scores of all rows, in their order; each with the trajectory that it is of."""

    def score(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """See ``Teacher``.

        Raises:
            UserError: a row is too long, could not be scored, or no server answers.
        """
        scores = self._scores(trajectories, 0)
        return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(one.logprobs_N for one in scores)]))

    def score_topk(self, trajectories: Sequence[Trajectory], k: int) -> TopKScores:
        """See ``TopKTeacher``; raises as ``score`` does."""
        scores = self._scores(trajectories, k)
        ids_NK = np.concatenate([np.zeros((0, k), np.int64), *(one.topk_ids_NK for one in scores)])
        if ids_NK.size and ids_NK.max() >= self._vocab_size:
            raise UserError(
                f"the teacher {self.name} finds token {ids_NK.max()} likely, which the student's tokenizer of "
                f"{self._vocab_size} tokens does not have; distil from a teacher of the student's own model family"
            )
        return TopKScores(
            torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(one.logprobs_N for one in scores)])),
            torch.from_numpy(ids_NK),
            torch.from_numpy(np.concatenate([np.zeros((0, k), np.float32), *(one.topk_logprobs_NK for one in scores)])),
        )

    def _scores(self, trajectories: Sequence[Trajectory], k: int) -> list[TokenScores]:
        prompt = self._prompt
        owned = [(one, row) for one in trajectories for row in rows_of(one, None if prompt is None else prompt(one))]
        return self._ask(owned, k)


class VLLMTeacher(VLLMScores):
    """Scores with vLLM in this process, all rows of a step as one batch.

    Args:
        engine: has the teacher's model.
        vocab_size, prompt: see ``VLLMScores``.
    """

    def __init__(self, engine: VLLMEngine, *, vocab_size: int, prompt: Prompt | None = None) -> None:
        super().__init__(engine.name, vocab_size, prompt)
        self._engine = engine

    @contextmanager
    def player(self, chat: ChatFormat, capacity: int) -> Iterator[Engine]:
        """An engine with which the teacher plays episodes itself: the one that scores, with a capacity of its own."""
        yield self._engine

    def close(self) -> None:
        """Ends its vLLM."""
        self._engine.close()

    def _ask(self, owned: Sequence[tuple[Trajectory, Row]], k: int) -> list[TokenScores]:
        return self._engine.score(
            [(row.token_ids_T.tolist(), np.flatnonzero(row.sampled_T).tolist()) for _, row in owned], k
        )


class ServerTeacher(VLLMScores):
    """Scores with a pool of vLLM servers.

    Args:
        client: the servers.
        vocab_size, prompt: see ``VLLMScores``.

    Raises:
        UserError: a server does not answer, or they serve different models.
    """

    def __init__(self, client: HttpClient, *, vocab_size: int, prompt: Prompt | None = None) -> None:
        self.client = client
        """The servers."""
        self.model = served_model(client)
        super().__init__(self.model.name, vocab_size, prompt)

    @contextmanager
    def player(self, chat: ChatFormat, capacity: int) -> Iterator[Engine]:
        """An engine with which the teacher plays episodes itself; the client knows its ``capacity``."""
        yield HttpEngine(self.client, chat.stop_token_ids, chat.vocab_size)

    def _ask(self, owned: Sequence[tuple[Trajectory, Row]], k: int) -> list[TokenScores]:
        done: SimpleQueue[tuple[int, TokenScores | Exception]] = SimpleQueue()
        for index, (_, row) in enumerate(owned):
            self.client.run(self._job(index, row, k, done))
        found: dict[int, TokenScores] = {}
        while len(found) < len(owned):
            index, outcome = done.get()
            if isinstance(outcome, RequestFailed):
                where = f"{owned[index][0].task}/{owned[index][0].example_id}"
                raise UserError(
                    f"the teacher {self.name} could not score the episode of {where}: {outcome}; look at the server's "
                    "log, and give the same command to continue"
                ) from outcome
            if isinstance(outcome, Exception):
                raise outcome
            found[index] = outcome
        return [found[index] for index in range(len(owned))]

    def _job(
        self, index: int, row: Row, k: int, done: SimpleQueue[tuple[int, TokenScores | Exception]]
    ) -> Callable[[], None]:
        def job() -> None:
            try:
                positions = np.flatnonzero(row.sampled_T).tolist()
                done.put((index, score_tokens(self.client, self.model, row.token_ids_T.tolist(), positions, k)))
            except Exception as error:  # carried to the caller's thread and raised there
                done.put((index, error))

        return job
