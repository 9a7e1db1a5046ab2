"""Rows of a data set: from the Hugging Face hub by the ``datasets`` library, or from a local JSONL file.

Worked example::

    read_jsonl("train.jsonl", {"question": str, "answer": str})
    # [{'question': 'Natalia sold …', 'answer': '… #### 72'}, …]
    # ValueError: train.jsonl, line 17: no field 'answer', only 'question' and 'reply'

Test it alone: ``pytest tests/tasks/data/test_rows.py``
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def hub_rows(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """All rows of one split of a data set on the hub, or of the copy that ``datasets`` has cached.

    Raises:
        ConnectionError: the hub cannot be reached and there is no cached copy.
    """
    from datasets import load_dataset

    try:
        return list(load_dataset(name, config, split=split))
    except OSError as error:  # the hub's, the network's and the cache's errors are all OSErrors
        raise ConnectionError(
            f"the data set {name!r} could not be loaded from the Hugging Face hub ({error}); connect to the "
            f"network, or download its {split}.jsonl and give its folder as path="
        ) from error


def read_jsonl(
    path: str | Path, fields: Mapping[str, type], check: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """Reads a file of one JSON object a line. Blank lines are skipped, further fields kept.

    Args:
        path: the file, UTF-8.
        fields: name and type of the fields that every row must have.
        check: raises ValueError, with the reason, for a row that is broken in another way.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is broken, named by file, line and reason; or there are no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected one JSON object a line{_with(fields)}")
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = _row(line, fields)
                if check is not None:
                    check(row)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows; expected one JSON object a line{_with(fields)}")
    return rows


def read_json(path: str | Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """Reads a file that is one JSON list of objects. Further fields are kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such list, or a row is broken, named by file, number and reason.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a JSON list of objects{_with(fields)}")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no rows; expected a JSON list of objects{_with(fields)}")
    for number, row in enumerate(rows):
        try:
            _check_fields(row, fields)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None
    return rows


def _row(line: bytes, fields: Mapping[str, type]) -> dict[str, Any]:
    try:
        row = json.loads(line.strip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not readable: nested too deeply") from None
    return _check_fields(row, fields)


def _check_fields(row: Any, fields: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, expected an object{_with(fields)}")
    for name, kind in fields.items():
        if name not in row:
            raise ValueError(f"no field {name!r}, only {_names(row) or 'an empty object'}")
        if not isinstance(row[name], kind):
            raise ValueError(f"field {name!r} is a {type(row[name]).__name__}, expected {kind.__name__}")
    return row


def _with(fields: Mapping[str, Any]) -> str:
    return f" with {_names(fields)}" if fields else ""


def _names(fields: Mapping[str, Any]) -> str:
    return " and ".join(map(repr, fields))
