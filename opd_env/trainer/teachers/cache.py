"""Teacher log-probs kept on disk, found again by what was scored: the teacher's weights and the tokens that it read.

Worked example::

    teacher = CachedTeacher(local, "runs/teacher_cache", identity=weights_hash(local.loaded.model), rows=local.rows)
    teacher.score(trajectories)                    # asks the teacher
    teacher.score(trajectories)                    # reads one SQLite file

It pays where the same episodes are scored again: a run that continues after a kill, runs that share seeds, or
evaluations of the same model. Values are those of the batch in which an episode was first scored; a teacher's own
rounding depends on its batch, so a run with a warm cache equals one without up to that rounding.

Test it alone: ``pytest tests/trainer/teachers/test_cache.py``
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from opd_env.episode.trajectory import Trajectory
from opd_env.errors import TrainingError
from opd_env.trainer.batch import Row
from opd_env.trainer.math.logprobs import TopKScores
from opd_env.trainer.teachers.base import Teacher, TopKTeacher, by_trajectory

FILE = "teacher_logprobs.sqlite"


class CachedTeacher:
    """Asks another teacher only for what has not been scored before.

    Args:
        teacher: what to ask.
        folder: made if needed; several runs and processes may share it.
        identity: everything that decides the scores but the tokens: weights and temperature.
        rows: the trajectories as this teacher reads them.

    Raises:
        TrainingError: (from ``score``) the file cannot be read or written.
    """

    def __init__(
        self,
        teacher: Teacher,
        folder: str | Path,
        identity: str,
        rows: Callable[[Sequence[Trajectory]], list[Row]],
    ) -> None:
        self.name = teacher.name
        self._teacher = teacher
        self._file = Path(folder) / FILE
        self._identity = identity
        self._rows = rows
        self.hits = self.misses = 0

    def score(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """See ``Teacher``."""
        return self._cached(trajectories, "sampled", lambda missing: (self._teacher.score(missing),))[0]

    def score_topk(self, trajectories: Sequence[Trajectory], k: int) -> TopKScores:
        """See ``TopKTeacher``.

        Raises:
            TrainingError: the teacher gives one log-prob per token only.
        """
        teacher = self._teacher
        if not isinstance(teacher, TopKTeacher):
            raise TrainingError(f"the teacher {teacher.name} gives one log-prob per token; set estimator=sampled")

        def score(missing: Sequence[Trajectory]) -> tuple[Tensor, ...]:
            top = teacher.score_topk(missing, k)
            return top.logprobs_N, top.topk_ids_NK, top.topk_logprobs_NK

        return TopKScores(*self._cached(trajectories, f"topk {k}", score))

    def _cached(
        self,
        trajectories: Sequence[Trajectory],
        what: str,
        score: Callable[[Sequence[Trajectory]], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        if not trajectories:
            return score(trajectories)
        keys = [self._key(self._rows([one]), what) for one in trajectories]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._file, timeout=60)) as database:
                database.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, value BLOB NOT NULL)")
                found = {key: known for key in keys if (known := _read(database, key))}
                missing = {key: one for key, one in zip(keys, trajectories, strict=True) if key not in found}
                if missing:
                    asked = list(missing.values())
                    columns = [by_trajectory(self._teacher, asked, column) for column in score(asked)]
                    new = dict(zip(missing, zip(*columns, strict=True), strict=True))
                    database.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?)", map(_entry, new.items()))
                    database.commit()
                    found |= new
        except (sqlite3.Error, OSError, SafetensorError) as error:
            raise TrainingError(
                f"the teacher's log-probs cannot be kept in {self._file}: {error}; free space, remove the file if it "
                "is damaged, or leave teacher_cache out"
            ) from error
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        return tuple(torch.cat(column) for column in zip(*(found[key] for key in keys), strict=True))

    def _key(self, rows: Sequence[Row], what: str) -> str:
        """Of all rows of an episode."""
        digest = hashlib.sha256(f"{self._identity}\n{what}\n".encode())
        for row in rows:
            digest.update(f"{len(row.token_ids_T)}\n".encode())
            digest.update(row.token_ids_T.astype("<i4").tobytes())
            digest.update(row.sampled_T.tobytes())
        return digest.hexdigest()


def _read(database: sqlite3.Connection, key: str) -> tuple[Tensor, ...] | None:
    row = database.execute("SELECT value FROM scores WHERE key = ?", (key,)).fetchone()
    return None if row is None else tuple(column for _, column in sorted(load(row[0]).items()))


def _entry(item: tuple[str, tuple[Tensor, ...]]) -> tuple[str, bytes]:
    key, columns = item
    return key, save({str(number): column.contiguous() for number, column in enumerate(columns)})
