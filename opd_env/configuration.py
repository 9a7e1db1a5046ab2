"""Typed settings: a frozen dataclass, filled from YAML files and then from the command line.

Worked example::

    @dataclass(frozen=True)
    class Settings:
        rate: float = 1e-3
        '''Learning rate, above 0.'''

    settings = configure(Settings, ["base.yaml", "--rate", "2e-3"], prog="my-tool")

Later files and options win over earlier ones. A nested dataclass is a mapping in YAML and dotted on the
command line (``--limits.max_turns 4``). ``null`` is None. A tuple of names may be written ``a,b``. Every
mistake ends in one ``ConfigError`` that names the key, what was given and what to write instead.

Test it alone: ``pytest tests/trainer/test_config.py``
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Settings = TypeVar("Settings")
Choice = TypeVar("Choice", bound=Enum)


class ConfigError(ValueError):
    """A setting that cannot be: the message is one sentence for the person who wrote it."""


def configure(
    settings: type[Settings], arguments: Sequence[str], *, prog: str, description: str | None = None
) -> Settings:
    """Builds ``settings`` from ``arguments``: YAML files first, then ``--key value`` options.

    Args:
        settings: a dataclass; the docstring under a field is its help text.
        arguments: what follows the command, such as ``["run.yaml", "--steps", "20"]``. ``--help`` prints the
            fields and exits.
        prog: the command, for the help text.
        description: first lines of the help text; the dataclass's docstring when None.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value of the wrong type or out of range.
    """
    types = field_types(settings)
    files, options = _split(settings, arguments)
    for file in files:
        _check_keys(settings, read_yaml(file), file)
    parser = _make_parser(settings, types, prog, description)
    words = [word for file in files for word in ("--config", file)]
    for key, value in options:
        words += [f"--{key}"] if value is None else [f"--{key}={_value_text(settings, key, value)}"]
    try:
        namespace = parser.parse_args(words)
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(_explain(settings, error, files, options)) from error
    values = {name: getattr(namespace, name) for name in types}
    return build(settings, values)


def build(settings: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Makes ``settings`` from plain values (a mapping that came from YAML or JSON).

    Raises:
        ConfigError: as ``configure``.
    """
    _check_keys(settings, values, "settings")
    made: dict[str, Any] = {}
    for name, annotation in field_types(settings).items():
        if name not in values:
            continue
        value, choices = values[name], _choices(annotation)
        nested = _nested(annotation)
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
        raise ConfigError(f"{name}={value!r} is unknown{_suggest(str(value), known)}")
    return choices(value)


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
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
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


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of ``X | None``; the type itself otherwise."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _nested(annotation: Any) -> type[Any] | None:
    return next((t for t in _members(annotation) if isinstance(t, type) and dataclasses.is_dataclass(t)), None)


def _choices(annotation: Any) -> type[Enum] | None:
    return next((t for t in _members(annotation) if isinstance(t, type) and issubclass(t, Enum)), None)


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


def _suggest(got: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(got, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if len(known) <= 12 else f"; --help lists all {len(known)}"


def _check_keys(settings: type[Any], values: Mapping[str, Any], where: str, prefix: str = "") -> None:
    types = field_types(settings)
    for key, value in values.items():
        if key not in types:
            raise ConfigError(f"{where}: unknown key {prefix + str(key)!r}{_suggest(str(key), list(types))}")
        nested = _nested(types[key])
        if nested is not None and isinstance(value, Mapping):
            _check_keys(nested, value, where, f"{prefix}{key}.")


def _split(settings: type[Any], arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Arguments as (files, options); an option without a value (``--help``) has None."""
    types = field_types(settings)
    files: list[str] = []
    options: list[tuple[str, str | None]] = []
    words = iter(arguments)
    for word in words:
        if word == "-h" or word.endswith(("--help", ".help")):
            options.append((word.lstrip("-").replace("-", "_") if word != "-h" else "help", None))
        elif word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            head, _, rest = key.partition(".")
            if head not in types:
                raise ConfigError(f"unknown option --{key}{_suggest(head, list(types))}")
            nested = _nested(types[head])
            if rest and nested is not None and rest.split(".")[0] not in field_types(nested):
                raise ConfigError(f"unknown option --{key}{_suggest(rest, list(field_types(nested)))}")
            given = value if equals else next(words, None)
            if given is None:
                raise ConfigError(f"--{key} needs a value")
            options.append((key, given))
        else:
            files.append(word)
    return files, options


def _value_text(settings: type[Any], key: str, value: str) -> str:
    """``a,b`` as the list that it means, where the field is a tuple of strings."""
    annotation = field_types(settings).get(key)
    if tuple[str, ...] in _members(annotation) and value != "null" and not value.startswith("["):
        return json.dumps([part.strip() for part in value.split(",") if part.strip()])
    return value


def _make_parser(settings: type[Any], types: Mapping[str, Any], prog: str, description: str | None) -> Any:
    import docstring_parser
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        print_config=None,
        usage=f"{prog} [FILE.yaml …] [--KEY VALUE …]",
        description=description or (settings.__doc__ or "").strip(),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help=argparse.SUPPRESS)
    family = [one for one in reversed(settings.__mro__) if dataclasses.is_dataclass(one)]
    documented = [entry for one in family for entry in docstring_parser.parse_from_object(one).params]
    help_texts = {entry.arg_name: entry.description for entry in documented}
    for field in dataclasses.fields(settings):
        annotation, choices = types[field.name], _choices(types[field.name])
        if choices is not None:
            names = tuple(str(member.value) for member in choices)
            annotation = Literal[names] | None if NoneType in _members(annotation) else Literal[names]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        keywords: dict[str, Any] = {} if default is dataclasses.MISSING else {"default": _default(default)}
        parser.add_argument(f"--{field.name}", type=annotation, help=help_texts.get(field.name), **keywords)
    return parser


def _default(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _explain(
    settings: type[Any], error: Exception, files: Sequence[str], options: Sequence[tuple[str, str | None]]
) -> str:
    """One sentence for a value that the parser refused."""
    text = str(error)
    found = re.search(r'key "([\w.]+)"', text)
    if found is None:
        return " ".join(text.split())
    key = found[1]
    given: Any = None
    where = ""
    for option, value in options:
        if option == key or option.startswith(f"{key}."):
            given, where, key = value, f"--{option}", option
    if not where:
        for file in files:
            found_value: Any = read_yaml(file)
            for part in key.split("."):
                found_value = found_value.get(part) if isinstance(found_value, dict) else None
            if found_value is not None:
                given, where = found_value, f"{key} in {file}"
    annotation: Any = settings
    for part in key.split("."):
        nested = _nested(annotation)
        mapping = next((t for t in _members(annotation) if get_origin(t) is collections.abc.Mapping), None)
        entry = get_args(mapping)[1] if mapping is not None else None
        annotation = field_types(nested).get(part) if nested is not None else entry
    expected = "a value that fits" if annotation is None else _describe(annotation)
    return f"{where or key} is {given!r}; expected {expected}"


def _describe(annotation: Any) -> str:
    choices = _choices(annotation)
    if choices is not None:
        return "one of " + ", ".join(str(member.value) for member in choices)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    names |= {tuple[str, ...]: "a list of names"}
    return " or ".join(names.get(t, "a mapping of keys to values") for t in _members(annotation))
