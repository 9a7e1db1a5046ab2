"""Any table of questions and answers as a task: a data set of the Hugging Face hub or a local file, and a short YAML.

``svamp.yaml`` beside this file is the whole of the task ``svamp``::

    dataset: ChilleD/SVAMP
    licence: MIT
    question: "{Body} {Question}"
    answer: Answer
    grader: number
    tools: [calculator]
    category: Type
    splits: {train: train, validation: train, test: test}

``load_task("my.yaml", split="test")`` builds one from a file, and so does ``--task my.yaml`` on the command line.
``register_task("mine")(table_task("my.yaml"))`` gives it a name. The keys are the fields of ``TableSpec``.

Test it alone: ``pytest tests/tasks/data/test_table.py``
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from string import Formatter
from typing import Any, ClassVar

import yaml

from opd_env.errors import unknown
from opd_env.messages import Message, system, user
from opd_env.tasks.base import Example, Grade, Task
from opd_env.tasks.data.rows import hub_rows, read_jsonl
from opd_env.tasks.data.splits import split_of
from opd_env.tasks.graders.answers import find_number, grade_number, grade_text, number_value
from opd_env.tools import Tool, get_tool


def _math(answer: str | None, golds: Sequence[str]) -> Grade:
    from opd_env.tasks.graders.boxed import grade_math

    return grade_math(answer, golds[0])


GRADERS: Mapping[str, Callable[[str | None, Sequence[str]], Grade]] = {
    "number": lambda answer, golds: grade_number(answer, golds[0]),
    "text": grade_text,
    "math": _math,
}
"""``number``: the final number, by value. ``text``: a short answer, exact match and F1. ``math``: LaTeX in a box."""


@dataclass(frozen=True)
class TableSpec:
    """What a YAML file says."""

    dataset: str
    """Hub id, or a JSONL file, or a folder with ``train.jsonl`` and so on; local paths count from the YAML file."""
    question: str
    """A field, or a text with fields in braces. With grader ``math``, ask for a ``\\boxed{{…}}``."""
    answer: str
    """Likewise. The field may hold a list of accepted answers for grader ``text``."""
    grader: str
    """One of ``GRADERS``."""
    config: str | None = None
    """Configuration of the hub's data set."""
    system: str | None = None
    """System message."""
    tools: tuple[str | Mapping[str, Any], ...] = ()
    """Names of tools, or ``{name: options}``; an option that is a file counts from the YAML file."""
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    """Split to the data set's split. Of several that share one, or one file, the first gets the rows that ``split_of``
    gives to none of the others."""
    train_splits: tuple[str, ...] = ("train",)
    """Splits that may be trained on."""
    filter: Mapping[str, Any] = field(default_factory=dict)
    """Field to the value, or list of values, of the rows that are kept."""
    category: str | None = None
    """Field to report by."""
    difficulty: str | None = None
    """Field with a whole number."""
    licence: str = "unknown"
    version: str = "1"
    """Raise it when the data change; changes of this file are noticed anyway."""


class TableTask(Task):
    """One split of a table; ``table_task`` makes the class of a YAML file.

    Args:
        split: one of the YAML's splits.
        path: a JSONL file or a folder of them, instead of the data set that the YAML names.

    Raises:
        ConnectionError: the hub cannot be reached.
        FileNotFoundError: there is no such file.
        ValueError: the YAML does not fit the rows; file, key, reason and what would be right are named.
    """

    spec: ClassVar[TableSpec]
    file: ClassVar[Path]

    def __init__(self, split: str = "train", *, path: str | Path | None = None) -> None:
        super().__init__(split)
        local = self._local() if path is None else Path(path).expanduser()
        rows = self._read(local)
        # One file holds the rows of all splits, whatever these are called.
        self._sharing = [
            one
            for one, source in self.spec.splits.items()
            if source == self.spec.splits[split] or (local is not None and not local.is_dir())
        ]
        self._rows = [(number, row) for number, row in enumerate(rows) if self._keeps(row)]
        if not self._rows:
            raise self._wrong(
                "filter", f"none of the {len(rows)} rows of split {split!r} is kept; loosen it, or add rows"
            )
        if self.spec.grader == "number":
            for number, row in self._rows:
                gold = find_number(self._answers(row)[0])
                if gold is None or number_value(gold) is None:
                    given = self._answers(row)[0][:60]
                    raise self._wrong("answer", f"row {number} has {given!r}, no number; use grader: text, or filter")

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Example:
        """The example at ``index``, in the order of the rows."""
        number, row = self._rows[index]
        spec, golds = self.spec, self._answers(row)
        opening = [] if spec.system is None else [system(spec.system)]
        return Example(
            id=f"{spec.splits[self.split]}-{number}",
            messages=(*opening, user(self._filled("question", row))),
            answer=golds[0],
            difficulty=0 if spec.difficulty is None else self._level(number, row),
            metadata={"answers": golds} | ({} if spec.category is None else {"category": str(row[spec.category])}),
        )

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        """By the grader that the YAML names."""
        return GRADERS[self.spec.grader](answer, example.metadata["answers"])

    def _local(self) -> Path | None:
        """The file or folder that the YAML names, if it is no data set of the hub."""
        local = self.file.parent / self.spec.dataset
        return local if local.exists() or local.suffix == ".jsonl" else None

    def _read(self, path: Path | None) -> list[dict[str, Any]]:
        source = self.spec.splits[self.split]
        if path is None:
            rows = hub_rows(self.spec.dataset, self.spec.config, source)
        else:
            rows = read_jsonl(path / f"{source}.jsonl" if path.is_dir() else path, {})
        for key in ("question", "answer", "category", "difficulty"):
            for name in _field_names(getattr(self.spec, key) or ""):
                self._require(key, name, rows)
        for name in self.spec.filter:
            self._require("filter", name, rows)
        return rows

    def _require(self, key: str, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        for number, row in enumerate(rows):
            if row.get(name) is None:
                raise self._wrong(key, f"row {number}: {unknown('field', name, row)}")

    def _keeps(self, row: Mapping[str, Any]) -> bool:
        for name, wanted in self.spec.filter.items():
            if row[name] not in (wanted if isinstance(wanted, list) else [wanted]):
                return False
        hashed = split_of(self._filled("question", row))
        return self.split == (hashed if hashed in self._sharing else self._sharing[0])

    def _filled(self, key: str, row: Mapping[str, Any]) -> str:
        text: str = getattr(self.spec, key)
        return text.format_map(row) if "{" in text else str(row[text])

    def _answers(self, row: Mapping[str, Any]) -> list[str]:
        value = row.get(self.spec.answer)
        if isinstance(value, list) and value:
            return [str(one) for one in value]
        return [self._filled("answer", row)]

    def _level(self, number: int, row: Mapping[str, Any]) -> int:
        try:
            return int(row[self.spec.difficulty or ""])
        except (TypeError, ValueError):
            raise self._wrong("difficulty", f"row {number} has no whole number in {self.spec.difficulty!r}") from None

    def _wrong(self, key: str, reason: str) -> ValueError:
        return ValueError(f"{self.file}: {key}: {reason}")


def table_task(file: str | Path) -> type[TableTask]:
    """The task class that a YAML file describes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML, or a key is missing, unknown or wrong; file, key and fix are named.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a YAML file with {', '.join(_required())}")
    text = path.read_text(encoding="utf-8")
    spec = _read_spec(path, text)
    members = {
        "__doc__": f"{spec.dataset}, graded by {spec.grader}.",
        "spec": spec,
        "file": path,
        "name": path.stem,
        "version": f"{spec.version} ({hashlib.sha256(text.encode()).hexdigest()[:8]})",
        "tools": tuple(_tool(path, entry) for entry in spec.tools),
        "splits": tuple(spec.splits),
        "train_splits": tuple(split for split in spec.train_splits if split in spec.splits),
        "licence": spec.licence,
    }
    return type(path.stem, (TableTask,), members)


def _read_spec(path: Path, text: str) -> TableSpec:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, expected keys such as {', '.join(_required())}")
    known = {one.name: one for one in fields(TableSpec)}
    for key in values:
        if key not in known:
            raise ValueError(f"{path}: {unknown('key', str(key), known)}")
    for key in _required():
        if key not in values:
            raise ValueError(f"{path}: {key}: missing; add {key}: …")
    for key, value in values.items():
        kind = _KINDS.get(key, str)
        if key == "version" and isinstance(value, int | float):
            values[key] = str(value)
        elif not isinstance(value, kind):
            raise ValueError(f"{path}: {key}: got {json.dumps(value, default=str)[:80]}, expected {_WORDS[kind]}")
    if values["grader"] not in GRADERS:
        raise ValueError(f"{path}: grader: {unknown('grader', values['grader'], GRADERS)}")
    for key in ("question", "answer"):
        try:
            _field_names(values[key])
        except ValueError as error:
            raise ValueError(f"{path}: {key}: {error}") from None
    if not values.get("splits", True):
        raise ValueError(f"{path}: splits: empty; write splits: {{test: test}}")
    tuples = {key: tuple(values[key]) for key in ("tools", "train_splits") if key in values}
    return TableSpec(**{**values, **tuples})


_KINDS: Mapping[str, type] = {"splits": dict, "filter": dict, "tools": list, "train_splits": list}
_WORDS: Mapping[type, str] = {str: "a text", dict: "key: value pairs", list: "a list"}


def _required() -> list[str]:
    return [one.name for one in fields(TableSpec) if one.default is MISSING and one.default_factory is MISSING]


def _field_names(text: str) -> list[str]:
    """The fields that a text with braces names, or the one field that it is."""
    if "{" not in text:
        return [text] if text else []
    names = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    for name in names:
        if not name or not name.replace("_", "").replace("-", "").replace(" ", "").isalnum():
            raise ValueError(f"{{{name}}} is no field; write {{field}}, and {{{{ for a brace")
    return names


def _tool(path: Path, entry: Any) -> str | Tool:
    if isinstance(entry, str):
        return entry
    if not (isinstance(entry, dict) and len(entry) == 1 and isinstance(options := next(iter(entry.values())), dict)):
        raise ValueError(
            f"{path}: tools: got {entry!r}, expected a name, or a name with its options: {{search: {{…}}}}"
        )
    (name,) = entry
    located = {
        key: str(path.parent / value) if isinstance(value, str) and (path.parent / value).exists() else value
        for key, value in options.items()
    }
    try:
        return get_tool(name, **located)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: tools: {error}") from error
