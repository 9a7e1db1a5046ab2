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
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from opd_env.episode.files import StoreError, explained, whole_or_nothing
from opd_env.episode.trajectory import Trajectory

if TYPE_CHECKING:
    import pyarrow as pa

JOURNAL, PARQUET = ".jsonl", ".parquet"
_ROWS_PER_GROUP = 128
"""Rows that are written to and read from Parquet at once."""
_ADDED = {"category", "row_starts"}
"""Columns with a default that files of earlier versions lack."""


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
                with whole_or_nothing(self.journal) as unfinished, unfinished.open("wb") as file:
                    file.writelines(map(journal_line, _ParquetRows(self.parquet)))
            self._file: int | None = os.open(self.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(self._file)
                raise StoreError(
                    f"{self.journal} is being written by another process; wait for it or choose another folder"
                ) from error
            os.ftruncate(self._file, 0 if overwrite else _Journal(self.journal).size)

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
            _write_parquet(_Journal(self.journal), self.parquet)
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
    _write_parquet((json.loads(journal_line(trajectory.to_row())) for trajectory in trajectories), path)
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
        return StoredTrajectories([_Journal(f) if f.suffix == JOURNAL else _ParquetRows(f) for f in files])


def load_written(folder: str | Path, name: str) -> StoredTrajectories | None:
    """What a ``TrajectoryWriter`` of this folder and name has stored; None when there is no file."""
    for suffix in (JOURNAL, PARQUET):  # while there is a journal, it is the truth
        if (path := Path(folder) / f"{name}{suffix}").exists():
            return load_trajectories(path)
    return None


class StoredTrajectories(Sequence[Trajectory]):
    """Trajectories that are read (and checked) when they are asked for. Made by ``load_trajectories``."""

    def __init__(self, files: Sequence[_Rows]) -> None:
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


class _Rows(ABC):
    """A file of rows, which are what ``Trajectory.to_row`` gives."""

    cut = False
    """The last row was cut short by a kill and is left out."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int) -> Mapping[str, Any]:
        """The row at ``index``, which lies in ``range(len(self))``."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return map(self.row, range(len(self)))


class _Journal(_Rows):
    """Where the whole lines of a journal start and stop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = [0]
        with path.open("rb") as file:
            for line in file:
                self.cut = not line.endswith(b"\n")
                if not self.cut:
                    self._starts.append(self._starts[-1] + len(line))

    @property
    def size(self) -> int:
        """Bytes up to the end of the last whole line."""
        return self._starts[-1]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def row(self, index: int) -> Mapping[str, Any]:
        start, stop = self._starts[index : index + 2]
        with self._path.open("rb") as file:
            file.seek(start)
            line = file.read(stop - start)
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"the line holds a {type(row).__name__}, not an object")
        except ValueError as error:
            where = f"{self._path}:{index + 1}"
            raise StoreError(f"{where}: no trajectory ({error}); delete the line to go on without it") from error
        return row


class _ParquetRows(_Rows):
    """A Parquet file, of which one row group is held in memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise StoreError(f"{path} is no Parquet file: {error}") from error
        missing = set(arrow_schema().names) - set(self._file.schema_arrow.names) - _ADDED
        if missing:
            raise StoreError(f"{path} holds no trajectories: it lacks {', '.join(sorted(missing))}")
        metadata = self._file.metadata
        self._starts = [0]
        for group in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self._group = -1
        self._table: Any = None

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> Mapping[str, Any]:
        group = bisect_right(self._starts, index) - 1
        if group != self._group:
            self._group, self._table = group, self._file.read_row_group(group)
        row: Mapping[str, Any] = self._table.slice(index - self._starts[group], 1).to_pylist()[0]
        return row


def _write_parquet(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes ``rows`` whole or not at all; holds few of them at once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema()
    with explained(path), whole_or_nothing(path) as unfinished, pq.ParquetWriter(unfinished, schema) as writer:
        left = iter(rows)
        while batch := list(islice(left, _ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema), row_group_size=_ROWS_PER_GROUP)


def journal_line(row: Mapping[str, Any]) -> bytes:
    """A row as a journal holds it."""
    text = json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:
        # A tool call may hold half of a surrogate pair ("\ud83d"), which no text file can: store U+FFFD.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def arrow_schema() -> pa.Schema:
    """Columns of the Parquet files: the fields of ``Trajectory``, scores as a list of name and value."""
    import pyarrow as pa

    call = {
        "name": pa.string(), "arguments": pa.string(), "start": pa.int64(), "stop": pa.int64(),
        "output": pa.string(), "error": pa.string(), "seconds": pa.float64(), "repairs": pa.list_(pa.string()),
        "retries": pa.int64(),
    }  # fmt: skip
    turn = {
        "start": pa.int64(), "stop": pa.int64(), "text": pa.string(), "truncated": pa.bool_(),
        "calls": pa.list_(pa.struct(call)), "generate_seconds": pa.float64(), "tool_seconds": pa.float64(),
        "user": pa.string(),
    }  # fmt: skip
    return pa.schema(
        {
            "task": pa.string(), "example_id": pa.string(), "sample": pa.int64(),
            "token_ids": pa.list_(pa.int32()), "sampled": pa.list_(pa.bool_()), "kind": pa.list_(pa.uint8()),
            "turn": pa.list_(pa.int16()), "logprobs": pa.list_(pa.float32()), "turns": pa.list_(pa.struct(turn)),
            "stop_reason": pa.string(), "answer": pa.string(), "correct": pa.bool_(), "difficulty": pa.int64(),
            "category": pa.string(), "seed": pa.int64(), "row_starts": pa.list_(pa.int64()),
            "drift": pa.int64(), "extracted": pa.string(),
            "grade_reason": pa.string(), "scores": pa.list_(pa.struct({"name": pa.string(), "value": pa.float64()})),
            "question": pa.string(), "seconds": pa.float64(),
        }
    )  # fmt: skip
