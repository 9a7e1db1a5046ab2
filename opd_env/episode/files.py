"""Files that are written whole or not at all, and what a user is told when the disk refuses.

Worked example::

    write_whole(run / "results.json", text)              # a kill leaves the old file, or none
    with explained(path), whole_or_nothing(path) as unfinished:
        torch.save(state, unfinished)

Test it alone: ``pytest tests/episode/test_store.py``
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"
"""End of the hidden name under which a file or folder is written before it takes its own."""


class StoreError(OSError):
    """A file that cannot be written or read; the message says which file, why, and what to do."""


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


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all.

    Raises:
        StoreError: it cannot be written.
    """
    with explained(path), whole_or_nothing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
