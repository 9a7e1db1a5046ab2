"""Typed settings: a frozen dataclass, made from plain values and written as them.

Worked example::

    @dataclass(frozen=True)
    class Settings:
        rate: float = 1e-3
        '''Learning rate, above 0.'''

    settings = build(Settings, read_yaml("run.yaml"))
    to_yaml(settings), fingerprint(settings)

``opd_env.settings.read`` fills them from files and options. Every mistake ends in one ``ConfigError`` that names the
key, what was given and what to write instead.

Test it alone: ``pytest tests/trainer/run/test_config.py``
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from opd_env.errors import did_you_mean

Settings = TypeVar("Settings")
Choice = TypeVar("Choice", bound=Enum)


class ConfigError(ValueError):
    """A setting that cannot be: the message is one sentence for the person who wrote it."""


def build(settings: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Makes ``settings`` from plain values (a mapping that came from YAML or JSON).

    Raises:
        ConfigError: as ``configure``.
    """
    check_keys(settings, values, "settings")
    made: dict[str, Any] = {}
    for name, annotation in field_types(settings).items():
        if name not in values:
            continue
        value, choices = values[name], choices_of(annotation)
        nested = nested_type(annotation)
        if nested is not None and value is not None and not isinstance(value, nested):
            value = build(nested, dict(value) if isinstance(value, Mapping) else vars(value))
        elif choices is not None and value is not None:
            value = choose(name, value, choices)
        elif isinstance(value, list):
            value = tuple(value)
        made[name] = value
    missing = [field.name for field in dataclasses.fields(_dataclass(settings)) if _required(field)]
    missing = [name for name in missing if made.get(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be set: in a YAML file, or --{missing[0]} …")
    try:
        return settings(**made)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def choose(name: str, value: Any, choices: type[Choice]) -> Choice:
    """The member of an enumeration that ``value`` names.

    Raises:
        ConfigError: no member has this value; the message lists or suggests one.
    """
    known = [str(member.value) for member in choices]
    if str(value) not in known:
        raise ConfigError(f"{name}={value!r} is unknown{suggestion(str(value), known)}")
    return choices(value)


def check_range(
    settings: Any,
    name: str,
    low: float,
    high: float | None = None,
    *,
    exclusive: bool = False,
    prefix: str = "",
) -> None:
    """Refuses a field that is no finite number from ``low`` (above it with ``exclusive``) to ``high``.

    Args:
        settings: has the field.
        name: of the field.
        low: lower bound.
        high: upper bound; None for no bound.
        exclusive: whether ``low`` itself is refused.
        prefix: stands before the name in the message.

    Raises:
        ConfigError: with the value, and what it must be.
    """
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{prefix}{name}={value!r} is not a number")
    above = value > low if exclusive else value >= low
    if not above or (high is not None and not value <= high) or value == float("inf"):
        bound = f"above {low}" if exclusive else f"at least {low}"
        limit = "" if high is None else f" and at most {high}"
        raise ConfigError(f"{prefix}{name}={value} is out of range: it must be {bound}{limit}")


def to_dict(settings: Any) -> dict[str, Any]:
    """``settings`` as plain values: what YAML and JSON can hold, and ``build`` reads back."""
    return {name: _plain(getattr(settings, name)) for name in field_types(type(settings))}


def to_yaml(settings: Any) -> str:
    """``settings`` as YAML text, in the order of the fields."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True, width=110)


def fingerprint(settings: Any, *, without: Sequence[str] = ()) -> str:
    """A short hash of the settings: equal for equal values, whatever file or option they came from.

    Args:
        settings: a dataclass.
        without: fields that change nothing in the result, such as the output folder.
    """
    values = {name: value for name, value in to_dict(settings).items() if name not in without}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no file {str(file)!r}; give the path of a YAML file of settings") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fault = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            fault = f"{error.problem} in line {error.problem_mark.line + 1}"
        raise ConfigError(f"{file} is not YAML: {fault}") from error
    if not isinstance(content, dict):
        kind = "nothing" if content is None else type(content).__name__
        raise ConfigError(f"{file} holds {kind}; expected 'key: value' lines")
    return content


def import_files(files: Sequence[str]) -> None:
    """Runs Python files, so that the tools and tasks that they register can be named in settings.

    Raises:
        ConfigError: a file is missing or fails; the message has the line.
    """
    for file in files:
        path = Path(file).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"imports names {file!r}, which is no file")
        name = f"opd_env_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"imports names {file!r}, which is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # so that its classes can be found and pickled
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
            where = f"{file}:{lines[-1]}" if lines else file
            raise ConfigError(f"{where} fails: {type(error).__name__}: {error}") from error


def field_types(settings: type[Any]) -> dict[str, Any]:
    """Name and type of every field."""
    hints = get_type_hints(settings)
    return {field.name: hints[field.name] for field in dataclasses.fields(_dataclass(settings))}


def _dataclass(settings: type[Any]) -> type[Any]:
    if not (isinstance(settings, type) and dataclasses.is_dataclass(settings)):
        raise TypeError(f"settings must be a dataclass, got {settings!r}")
    return settings


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of ``X | None``; the type itself otherwise."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def nested_type(annotation: Any) -> type[Any] | None:
    """The dataclass among the alternatives of a field's type."""
    return next((t for t in members_of(annotation) if isinstance(t, type) and dataclasses.is_dataclass(t)), None)


def choices_of(annotation: Any) -> type[Enum] | None:
    """The enumeration among the alternatives of a field's type."""
    return next((t for t in members_of(annotation) if isinstance(t, type) and issubclass(t, Enum)), None)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def suggestion(got: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the one that was meant, or all that are known."""
    listed = f"; known: {', '.join(known)}" if len(known) <= 12 else f"; --help lists all {len(known)}"
    return did_you_mean(got, known) or listed


def check_keys(settings: type[Any], values: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Refuses a key that no field has.

    Raises:
        ConfigError: one such, with what was meant.
    """
    types = field_types(settings)
    for key, value in values.items():
        if key not in types:
            got, known = f"{prefix}{key}", [prefix + name for name in types]
            raise ConfigError(f"{where}: unknown key {got!r}{suggestion(got, known)}")
        nested = nested_type(types[key])
        if nested is not None and isinstance(value, Mapping):
            check_keys(nested, value, where, f"{prefix}{key}.")
