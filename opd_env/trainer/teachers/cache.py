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

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from opd_env.episode.trajectory import Trajectory
from opd_env.errors import TrainingError
from opd_env.trainer.batch import Row
from opd_env.trainer.math.logprobs import TopKScores
from opd_env.trainer.teachers.base import Scores, Teacher, joined, scores_by_trajectory

FILE = "teacher_logprobs.sqlite"


class CachedTeacher:
    """A ``TopKTeacher`` that asks another teacher only for what has not been scored before.

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
        return self._cached(trajectories, None)[0]

    def score_topk(self, trajectories: Sequence[Trajectory], k: int) -> TopKScores:
        return TopKScores(*self._cached(trajectories, k))

    def _cached(self, trajectories: Sequence[Trajectory], k: int | None) -> Scores:
        if not trajectories:
            return joined(scores_by_trajectory(self._teacher, trajectories, k))
        what = "sampled" if k is None else f"topk {k}"
        keys = [self._key(self._rows([trajectory]), what) for trajectory in trajectories]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._file, timeout=60)) as database:
                database.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, value BLOB NOT NULL)")
                found = {key: known for key in keys if (known := _read(database, key))}
                missing = {key: one for key, one in zip(keys, trajectories, strict=True) if key not in found}
                if missing:
                    scores = scores_by_trajectory(self._teacher, list(missing.values()), k)
                    new = dict(zip(missing, scores, strict=True))
                    database.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?)", map(_entry, new.items()))
                    database.commit()
                    found |= new
        except (sqlite3.Error, OSError, SafetensorError) as error:
            raise TrainingError(
                f"the teacher's log-probs cannot be kept in {self._file}: {error}; free space, remove the file if it "
                "is damaged, or leave teacher.cache out"
            ) from error
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        return joined([found[key] for key in keys])

    def _key(self, rows: Sequence[Row], what: str) -> str:
        """Of all rows of an episode."""
        digest = hashlib.sha256(f"{self._identity}\n{what}\n".encode())
        for row in rows:
            digest.update(f"{len(row.token_ids_T)}\n".encode())
            digest.update(row.token_ids_T.astype("<i4").tobytes())
            digest.update(row.sampled_T.tobytes())
        return digest.hexdigest()


def _read(database: sqlite3.Connection, key: str) -> Scores | None:
    row = database.execute("SELECT value FROM scores WHERE key = ?", (key,)).fetchone()
    return None if row is None else tuple(column for _, column in sorted(load(row[0]).items()))


def _entry(item: tuple[str, Scores]) -> tuple[str, bytes]:
    key, columns = item
    return key, save({str(number): column.contiguous() for number, column in enumerate(columns)})
