"""Trajectories on disk: a journal while episodes finish, one Parquet file afterwards.

Worked example::

    with TrajectoryWriter(run / "trajectories", "after") as writer:      # after.jsonl
        rollout(task, engine, chat_format, on_finished=writer.append)
                                                                         # after.parquet
    episodes = load_trajectories(run / "trajectories")                   # opens at once, reads on access
    episodes[0].answer

A journal holds one JSON line per episode, handed to the system the moment the episode ends: a process that is
killed loses no finished episode, and a line that a full disk cut short is taken back. While a journal exists it
is the truth, and a Parquet file of the same name is its copy; so there is no moment at which a kill could lose
or double anything. The Parquet files are ordinary ones: ``datasets.load_dataset("parquet", …)`` and pandas read
them.

Test it alone: ``pytest tests/episode/test_store.py``
"""

from __future__ import annotations

import fcntl
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

from opd_env.episode.files import (
    JOURNAL,
    PARQUET,
    Journal,
    ParquetRows,
    Rows,
    StoreError,
    explained,
    journal_line,
    whole_or_nothing,
    write_parquet,
)
from opd_env.episode.trajectory import Trajectory

__all__ = ["StoreError", "StoredTrajectories", "TrajectoryWriter", "load_trajectories", "save_trajectories"]


class TrajectoryWriter:
    """Appends finished episodes to ``folder/name.jsonl``; ``close`` turns that into ``folder/name.parquet``.

    What an earlier writer of the same name stored is kept and continued; a last line that a kill cut short is
    dropped. Leaving a ``with`` block by an exception keeps the journal, for the next writer to continue.

    Args:
        folder: made if it is missing.
        name: file name without suffix.
        overwrite: throw away what is stored under the name, instead of continuing it.

    Raises:
        StoreError: the folder cannot be written, or another process is writing the same name.
    """

    def __init__(self, folder: str | Path, name: str, *, overwrite: bool = False) -> None:
        self.journal = Path(folder) / f"{name}{JOURNAL}"
        self.parquet = Path(folder) / f"{name}{PARQUET}"
        with explained(self.journal):
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            if self.parquet.exists() and not self.journal.exists():
                rows = ParquetRows(self.parquet)
                with whole_or_nothing(self.journal) as unfinished, unfinished.open("wb") as file:
                    file.writelines(journal_line(rows.row(index)) for index in range(len(rows)))
            self._file: int | None = os.open(self.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(self._file)
                raise StoreError(
                    f"{self.journal} is being written by another process; wait for it or choose another folder"
                ) from error
            os.ftruncate(self._file, 0 if overwrite else Journal(self.journal).size)

    def append(self, trajectory: Trajectory) -> None:
        """Stores one finished episode; once this has returned, killing the process cannot lose it.

        Raises:
            StoreError: the disk is full or failed; the journal holds what it held before.
            ValueError: the writer is closed.
        """
        if self._file is None:
            raise ValueError(f"the writer of {self.journal} is closed; open another one to go on")
        line = journal_line(trajectory.to_row())
        size = os.fstat(self._file).st_size
        with explained(self.journal):
            try:
                while line:
                    line = line[os.write(self._file, line) :]
            except OSError:
                os.ftruncate(self._file, size)
                raise

    def close(self) -> None:
        """Writes the Parquet file, then removes the journal. A second ``close`` does nothing.

        Raises:
            StoreError: the Parquet file cannot be written; the journal stays.
        """
        if self._file is None:
            return
        try:
            rows = Journal(self.journal)
            write_parquet((rows.row(index) for index in range(len(rows))), self.parquet)
            with explained(self.journal):
                self.journal.unlink()
        finally:
            self._release()

    def _release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        self._release()


def save_trajectories(trajectories: Iterable[Trajectory], path: str | Path) -> Path:
    """Writes a Parquet file: whole, or not at all.

    Args:
        trajectories: read once; few are held at a time.
        path: ends in ``.parquet``; its folder is made if it is missing.

    Raises:
        StoreError: the file cannot be written; nothing is left behind.
        ValueError: the path ends differently.
    """
    path = Path(path)
    if path.suffix != PARQUET:
        raise ValueError(f"trajectories are saved as Parquet, got {str(path)!r}; end the name with {PARQUET}")
    # By way of the journal's text, so that both formats hold the same for every string.
    write_parquet((json.loads(journal_line(trajectory.to_row())) for trajectory in trajectories), path)
    return path


def load_trajectories(path: str | Path) -> StoredTrajectories:
    """Opens stored trajectories without reading them.

    Args:
        path: a Parquet file, a journal, or a folder of them (in the order of their names; where both exist for
            a name, the journal counts).

    Raises:
        StoreError: nothing is there, or a file is damaged.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        visible = [file for file in path.iterdir() if not file.name.startswith(".")]
        journals = {file.with_suffix(JOURNAL) for file in visible if file.suffix in (JOURNAL, PARQUET)}
        files = [file if file.exists() else file.with_suffix(PARQUET) for file in sorted(journals)]
    if not files or not files[0].exists():
        raise StoreError(f"no trajectories at {str(path)!r}; expected {PARQUET} or {JOURNAL}, or a folder of them")
    with explained(path):
        return StoredTrajectories([Journal(f) if f.suffix == JOURNAL else ParquetRows(f) for f in files])


class StoredTrajectories(Sequence[Trajectory]):
    """Trajectories that are read (and checked) when they are asked for. Made by ``load_trajectories``."""

    def __init__(self, files: Sequence[Rows]) -> None:
        self._files = files
        self._starts = [0]
        for file in files:
            self._starts.append(self._starts[-1] + len(file))

    @property
    def cut_lines(self) -> int:
        """Journals whose last line a kill cut short; that episode is left out."""
        return sum(file.cut for file in self._files)

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trajectory]: ...
    def __getitem__(self, index: int | slice) -> Trajectory | list[Trajectory]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{len(self)} trajectories are stored, no number {index}")
        index %= len(self)
        number = bisect_right(self._starts, index) - 1
        return Trajectory.from_row(self._files[number].row(index - self._starts[number]))
