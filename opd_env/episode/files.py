"""The two file formats that ``opd_env.episode.store`` keeps trajectories in, as rows of plain values.

A journal (``.jsonl``) has one JSON object per line and can be appended to. A Parquet file is written whole or not
at all, and is read one row group at a time. Rows are what ``Trajectory.to_row`` gives::

    write_parquet([trajectory.to_row()], Path("episodes.parquet"))
    ParquetRows(Path("episodes.parquet")).row(0)["answer"]

Test it alone: ``pytest tests/episode/test_store.py``
"""

from __future__ import annotations

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

JOURNAL, PARQUET = ".jsonl", ".parquet"
UNFINISHED = ".unfinished"
"""End of the hidden name under which a file or folder is written before it takes its own."""
_ROWS_PER_GROUP = 128
"""Rows that are written to and read from Parquet at once."""
_ADDED = {"category", "row_starts"}
"""Columns with a default that files of earlier versions lack."""


class StoreError(OSError):
    """Trajectories that cannot be written or read; the message says which file, why, and what to do."""


class Rows(Protocol):
    """A file of rows."""

    cut: bool
    """The last row was cut short by a kill and is left out."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Mapping[str, Any]:
        """The row at ``index``, which lies in ``range(len(self))``."""


class Journal:
    """A journal on disk: where its whole lines start and stop. See ``Rows``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = [0]
        self.cut = False
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
        """See ``Rows``."""
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


class ParquetRows:
    """A Parquet file, of which one row group is held in memory. See ``Rows``."""

    cut = False

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
        """See ``Rows``."""
        group = bisect_right(self._starts, index) - 1
        if group != self._group:
            self._group, self._table = group, self._file.read_row_group(group)
        row: Mapping[str, Any] = self._table.slice(index - self._starts[group], 1).to_pylist()[0]
        return row


def write_parquet(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes ``rows`` whole or not at all; holds few of them at once.

    Raises:
        StoreError: the file cannot be written; nothing is left behind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema()
    with explained(path), whole_or_nothing(path) as unfinished, pq.ParquetWriter(unfinished, schema) as writer:
        for batch in _batches(rows):
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


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """Gives a hidden path to write to, which takes the name ``path`` at the end if nothing went wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())  # or a power failure could leave the new name with nothing in it
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what processes that were killed had begun to write in a folder or below it."""
    for path in folder.rglob(f".*{UNFINISHED}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an error of the operating system on ``path`` into one sentence."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{path} cannot be used: {reason}; free space or choose another folder") from error


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    batch: list[Mapping[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_PER_GROUP:
            yield batch
            batch = []
    if batch:
        yield batch
