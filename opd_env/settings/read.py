"""The command line of a command with settings: YAML files first, then ``--key value``.

Worked example::

    settings = configure(OPDConfig, ["base.yaml", "--optimizer.learning_rate", "2e-3"], prog="opd-env train")

Later files and options win over earlier ones. A group is a mapping in YAML and dotted on the command line
(``--sampling.limits.max_turns 4``). ``null`` is None. A list of names may be written ``a,b``.

Test it alone: ``pytest tests/settings``
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, get_args, get_origin

import yaml

from opd_env.settings.fields import (
    AnySettings,
    ConfigError,
    Misfit,
    build,
    check_keys,
    field_types,
    members_of,
    nested_type,
    outline,
    place_of,
    read_yaml,
)


def configure(settings: type[AnySettings], arguments: Sequence[str], *, prog: str) -> AnySettings:
    """Builds ``settings`` from ``arguments``: YAML files first, then ``--key value`` options.

    Args:
        settings: its docstring begins the help text, and the docstring under a field is the field's.
        arguments: what follows the command, such as ``["run.yaml", "--run.steps", "20"]``. ``--help`` prints what
            most runs set, ``--help-all`` everything; both exit.
        prog: the command, for the help text.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value of the wrong type or out of range.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    files, options = _split(arguments)
    for word in ("help", "help_all"):
        if word in dict(options):
            print(help_text(settings, prog, everything=word == "help_all"))
            raise SystemExit(0)
    for file in files:
        content = read_yaml(file)
        check_keys(settings, content, file)
        _merge(settings, values, content)
        origin |= dict.fromkeys(_leaves(content), file)
    for key, text in options:
        _set(settings, values, key, text)
        origin[key] = ""
    try:
        return build(settings, values)
    except Misfit as error:
        raise ConfigError(f"{_named(error.key, origin)} is {error.got}") from error


def _named(key: str, origin: Mapping[str, str]) -> str:
    """A setting as the person wrote it: ``--run.steps``, or ``run.steps in run.yaml``."""
    written = [one for one in origin if one == key or key.startswith(f"{one}.") or one.startswith(f"{key}.")]
    file = origin[written[-1]] if written else None
    return key if file is None else f"{key} in {file}" if file else f"--{key}"


def _split(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Arguments as (files, options); an option without a value (``--help``) has None."""
    files: list[str] = []
    options: list[tuple[str, str | None]] = []
    words = iter(arguments)
    for word in words:
        if word in ("-h", "--help", "--help-all"):
            options.append(("help_all" if word == "--help-all" else "help", None))
        elif word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            given = value if equals else next(words, None)
            options.append((key.replace("-", "_"), given))
        elif word.startswith("-"):
            raise ConfigError(f"unknown option {word}; options have two dashes, such as --help")
        else:
            files.append(word)
    return files, options


def _merge(settings: type[Any], values: dict[str, Any], content: Mapping[str, Any]) -> None:
    """Lays a file over what earlier ones gave: group by group, any other value whole."""
    for key, value in content.items():
        nested = nested_type(field_types(settings)[key])
        if nested is not None and isinstance(value, Mapping):
            inner = dict(values[key]) if isinstance(values.get(key), Mapping) else {}
            _merge(nested, inner, value)
            value = inner
        values[key] = value


def _leaves(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in content.items():
        names += _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [f"{prefix}{key}"]
    return names


def _set(settings: type[Any], values: dict[str, Any], key: str, text: str | None) -> None:
    """Puts an option's value where its dotted key says; in a mapping of free keys, any key will do."""
    kind: Any = settings
    *groups, last = key.split(".")
    for part in groups:
        kind = _inside(kind, part)
        inner = values.get(part)
        values[part] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[part]
    kind = _inside(kind, last)
    if kind is None:
        raise ConfigError(f"unknown option --{key}{place_of(settings, key, '--')}")
    if text is None:
        raise ConfigError(f"--{key} needs a value")
    values[last] = _value(kind, text)


def _inside(kind: Any, part: str) -> Any:
    """The type of what a dotted name finds in a group or a mapping of free keys; None: there is no such thing."""
    nested = nested_type(kind)
    if nested is not None:
        return field_types(nested).get(part)
    mapping = next((one for one in members_of(kind) if get_origin(one) is Mapping), None)
    return Any if kind is Any else None if mapping is None else get_args(mapping)[1]


def _value(annotation: Any, text: str) -> Any:
    """The value that an option's text means for a field of this type."""
    members = members_of(annotation)
    if text == "null":
        return None
    if tuple[str, ...] in members and not text.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    if str in members or any(isinstance(kind, type) and issubclass(kind, Enum) for kind in members):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def help_text(settings: type[Any], prog: str, *, everything: bool) -> str:
    """What ``--help`` and ``--help-all`` print: names with type, default and meaning, wrapped to the terminal."""
    width = min(shutil.get_terminal_size().columns, 120)
    texts, types = _documented(settings), outline(settings)
    names = list(types) if everything else list(getattr(settings, "common", ())) or list(types)
    about = " ".join((settings.__doc__ or "").partition("Raises:")[0].split())
    lines = [f"usage: {prog} [FILE.yaml …] [--KEY VALUE …]", "", *textwrap.wrap(about, width), ""]
    group = ""
    for name in names:
        head = name.partition(".")[0] if "." in name else ""
        if everything and head != group:
            lines.append("")
        group = head
        told = texts.get(name, "")
        default = _default(settings, name)
        told += "" if default is None else f" [{default}]"
        lines += [f"  --{name} {_form(types[name])}"]
        lines += textwrap.wrap(told, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if len(names) < len(types):
        lines += ["", f"These are what most runs set. {prog} --help-all shows all {len(types)}, group by group."]
    return "\n".join(lines)


def _documented(settings: type[Any], prefix: str = "") -> dict[str, str]:
    """The docstring under every field, by dotted name."""
    import docstring_parser

    found: dict[str, str] = {}
    for family in reversed(settings.__mro__):
        if dataclasses.is_dataclass(family):
            for entry in docstring_parser.parse_from_object(family).params:
                found[prefix + entry.arg_name] = " ".join((entry.description or "").split())
    for name, annotation in field_types(settings).items():
        nested = nested_type(annotation)
        if nested is not None:
            found |= _documented(nested, f"{prefix}{name}.")
    return found


def _default(settings: type[Any], name: str) -> str | None:
    """A setting's default as it is written; None where it must be set."""
    head, _, rest = name.partition(".")
    field = next(field for field in dataclasses.fields(settings) if field.name == head)
    nested = nested_type(field_types(settings)[head])
    if rest and nested is not None:
        return _default(nested, rest)
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return None
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if isinstance(value, Enum):
        value = value.value
    return json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, str) else value or '""'


def _form(annotation: Any) -> str:
    """What stands for a value: ``{sampled,full,topk}``, ``NUMBER``, ``NAME,…``."""
    forms = {int: "N", float: "X", bool: "{true,false}", str: "TEXT"}
    for kind in members_of(annotation):
        if isinstance(kind, type) and issubclass(kind, Enum):
            return "{" + ",".join(str(member.value) for member in kind) + "}"
        if kind in forms:
            return forms[kind]
    return "A,B" if tuple[str, ...] in members_of(annotation) else "{KEY: VALUE}"
