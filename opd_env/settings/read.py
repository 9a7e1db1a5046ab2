"""The command line of a command with settings: YAML files first, then ``--key value``.

Worked example::

    settings = configure(Settings, ["base.yaml", "--rate", "2e-3"], prog="my-tool")

Later files and options win over earlier ones. A nested dataclass is a mapping in YAML and dotted on the command line
(``--limits.max_turns 4``). ``null`` is None. A tuple of names may be written ``a,b``.

Test it alone: ``pytest tests/trainer/run/test_config.py``
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from opd_env.settings.fields import (
    ConfigError,
    Settings,
    build,
    check_keys,
    choices_of,
    field_types,
    members_of,
    nested_type,
    read_yaml,
    suggestion,
)


def configure(settings: type[Settings], arguments: Sequence[str], *, prog: str) -> Settings:
    """Builds ``settings`` from ``arguments``: YAML files first, then ``--key value`` options.

    Args:
        settings: a dataclass; its docstring begins the help text, and the docstring under a field is the field's.
        arguments: what follows the command, such as ``["run.yaml", "--steps", "20"]``. ``--help`` prints the
            fields and exits.
        prog: the command, for the help text.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value of the wrong type or out of range.
    """
    types = field_types(settings)
    files, options = _split(settings, arguments)
    for file in files:
        check_keys(settings, read_yaml(file), file)
    parser = _make_parser(settings, types, prog)
    words = [word for file in files for word in ("--config", file)]
    for key, value in options:
        words += [f"--{key}"] if value is None else [f"--{key}={_value_text(settings, key, value)}"]
    try:
        namespace = parser.parse_args(words)
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(_explain(settings, error, files, options)) from error
    values = {name: getattr(namespace, name) for name in types}
    return build(settings, values)


def _split(settings: type[Any], arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Arguments as (files, options); an option without a value (``--help``) has None."""
    types = field_types(settings)
    files: list[str] = []
    options: list[tuple[str, str | None]] = []
    words = iter(arguments)
    for word in words:
        if word == "-h" or word.endswith(("--help", ".help")):
            options.append((word.lstrip("-").replace("-", "_") if word != "-h" else "help", None))
        elif word.startswith("-") and not word.startswith("--"):
            raise ConfigError(f"unknown option {word}; options have two dashes, such as --{next(iter(types))}")
        elif word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            head, _, rest = key.partition(".")
            if head not in types:
                raise ConfigError(f"unknown option --{key}{suggestion(f'--{head}', [f'--{name}' for name in types])}")
            nested = nested_type(types[head])
            if rest and nested is not None and rest.split(".")[0] not in field_types(nested):
                known = [f"--{head}.{name}" for name in field_types(nested)]
                raise ConfigError(f"unknown option --{key}{suggestion(f'--{key}', known)}")
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
    if tuple[str, ...] in members_of(annotation) and value != "null" and not value.startswith("["):
        return json.dumps([part.strip() for part in value.split(",") if part.strip()])
    return value


def _make_parser(settings: type[Any], types: Mapping[str, Any], prog: str) -> Any:
    import docstring_parser
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        print_config=None,
        usage=f"{prog} [FILE.yaml …] [--KEY VALUE …]",
        description=(settings.__doc__ or "").partition("Raises:")[0].strip(),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help=argparse.SUPPRESS)
    family = [one for one in reversed(settings.__mro__) if dataclasses.is_dataclass(one)]
    documented = [entry for one in family for entry in docstring_parser.parse_from_object(one).params]
    help_texts = {entry.arg_name: entry.description for entry in documented}
    for field in dataclasses.fields(settings):
        annotation, choices = types[field.name], choices_of(types[field.name])
        if choices is not None:
            names = tuple(str(member.value) for member in choices)
            annotation = Literal[names] | None if NoneType in members_of(annotation) else Literal[names]
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
        nested = nested_type(annotation)
        mapping = next((t for t in members_of(annotation) if get_origin(t) is collections.abc.Mapping), None)
        entry = get_args(mapping)[1] if mapping is not None else None
        annotation = field_types(nested).get(part) if nested is not None else entry
    expected = "a value that fits" if annotation is None else _describe(annotation)
    return f"{where or key} is {given!r}; expected {expected}"


def _describe(annotation: Any) -> str:
    choices = choices_of(annotation)
    if choices is not None:
        return "one of " + ", ".join(str(member.value) for member in choices)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    names |= {tuple[str, ...]: "a list of names", Mapping[str, float]: "a mapping of keys to numbers"}
    return " or ".join(names.get(t, "a mapping of keys to values") for t in members_of(annotation))
