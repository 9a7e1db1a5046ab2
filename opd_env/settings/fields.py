"""Typed settings: frozen dataclasses that check themselves, made from plain values and written as them.

Worked example::

    @dataclass(frozen=True)
    class OptimizerSettings(Settings):
        path = "optimizer"
        learning_rate: float = number(1e-3, above=0)
        '''Peak learning rate.'''

    settings = build(OptimizerSettings, {"learning_rate": 5e-5})
    OptimizerSettings(learning_rate=-1)      # ConfigError: optimizer.learning_rate=-1 is out of range: it must be …
    to_yaml(settings), fingerprint(settings)

``opd_env.settings.read`` fills them from files and options. Every mistake ends in one ``ConfigError``, one sentence
that names the key, what was given and what to write instead.

Test it alone: ``pytest tests/settings``
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from opd_env.errors import did_you_mean

AnySettings = TypeVar("AnySettings")


class ConfigError(ValueError):
    """A setting that cannot be: the message is one sentence for the person who wrote it."""


class Misfit(ConfigError):
    """A value of the wrong type. ``key`` says where, so that whoever read it can name the file or option."""

    def __init__(self, key: str, value: Any, annotation: Any) -> None:
        self.key, self.got = key, f"{value!r}; expected {describe(annotation)}"
        super().__init__(f"{key} is {self.got}")


def number(default: Any, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf) -> Any:
    """The default of a number field, and its bounds: at least ``low``, more than ``above``, at most ``high``."""
    return dataclasses.field(default=default, metadata={"low": low, "above": above, "high": high})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of all settings. Making one checks types, names of choices and bounds; then ``check``.

    Raises:
        ConfigError: a value does not fit.
    """

    path: ClassVar[str] = ""
    """Where the group stands in the whole, for messages: ``optimizer``."""
    common: ClassVar[tuple[str, ...]] = ()
    """Dotted names of what most runs set: those that ``--help`` shows."""
    refused: ClassVar[Mapping[str, str]] = {}
    """Names that are no settings, and why: told instead of a guess at what was meant."""

    def __post_init__(self) -> None:
        for name, annotation in field_types(type(self)).items():
            object.__setattr__(self, name, _fitting(annotation, getattr(self, name), self.key(name)))
        for field in dataclasses.fields(self):
            self._in_range(field)
        self.check()

    def check(self) -> None:
        """Refuses what several fields of the group decide together."""

    @classmethod
    def key(cls, name: str) -> str:
        """A field's dotted name in the whole."""
        return f"{cls.path}.{name}" if cls.path else name

    def _in_range(self, field: dataclasses.Field[Any]) -> None:
        value, key = getattr(self, field.name), self.key(field.name)
        if value == "" and field.default != "":
            raise ConfigError(f"{key} is empty; set it")
        if "low" not in field.metadata or value is None:
            return
        low, above, high = (field.metadata[name] for name in ("low", "above", "high"))
        if low <= value <= high and value > above and math.isfinite(value):
            return
        bound = f"above {above:g}" if above > -math.inf else f"at least {low:g}"
        limit = f" and at most {high:g}" if high < math.inf else ""
        raise ConfigError(f"{key}={value} is out of range: it must be {bound}{limit}")


def build(settings: type[AnySettings], values: Mapping[str, Any], *, source: str = "settings") -> AnySettings:
    """Makes ``settings`` from plain values, a mapping as YAML or JSON gives it: groups are mappings in it.

    Args:
        settings: a class of settings, or another dataclass.
        values: by name.
        source: what the values came from, for messages.

    Raises:
        ConfigError: an unknown key, a missing one, a value of the wrong type or out of range.
    """
    check_keys(settings, values, source)
    absent = list(missing(settings, values))
    if absent:
        names = " and ".join([", ".join(absent[:-1]), absent[-1]] if absent[1:] else absent)
        raise ConfigError(f"{names} must be set: in a YAML file, or --{absent[0]} …")
    return settings(**values)


def missing(settings: Any, values: Mapping[str, Any]) -> Iterator[str]:
    """Dotted names of required settings that ``values`` lacks."""
    for field in dataclasses.fields(settings):
        nested, value = nested_type(field_types(settings)[field.name]), values.get(field.name)
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING:
            continue
        if nested is not None and (value is None or isinstance(value, Mapping)):
            yield from missing(nested, value or {})
        elif value is None:
            yield settings.key(field.name) if issubclass(settings, Settings) else field.name


def check_keys(settings: type[Any], values: Mapping[str, Any], source: str) -> None:
    """Refuses a key that no field has.

    Raises:
        ConfigError: where it belongs, or what was meant.
    """
    for key in _unknown(settings, values):
        raise ConfigError(f"{source}: unknown key {key!r}{place_of(settings, key)}")


def _unknown(settings: type[Any], values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    types = field_types(settings)
    for key, value in values.items():
        nested = nested_type(types.get(key))
        if key not in types:
            yield f"{prefix}{key}"
        elif nested is not None and isinstance(value, Mapping):
            yield from _unknown(nested, value, f"{prefix}{key}.")


def place_of(settings: type[Any], key: str, dashes: str = "") -> str:
    """The end of a message about an unknown key: why there is none, where it belongs, or what was meant.

    Args:
        settings: the whole.
        key: as it was written, dotted.
        dashes: what stands before a name where it is written.
    """
    name = key.rpartition(".")[2]
    refused: Mapping[str, str] = getattr(settings, "refused", {})
    if name in refused:
        return f": {refused[name]}"
    known = outline(settings)
    flat = key.replace(".", "_")
    belongs = [path for path in known if path.replace(".", "_") == flat or path.rpartition(".")[2] == name]
    if key in belongs:  # right, but written with a dot where the file wants a group
        group, _, leaf = key.rpartition(".")
        return f"; write it inside its group, {group}: {{{leaf}: …}}"
    if belongs:
        return f"; write {' or '.join(dashes + path for path in belongs)}"
    # By the whole name first, then by its last part: "evl_every" and "max_turn" are both found.
    spelled = {path.replace(".", "_"): path for path in known}
    spelled |= {path.rpartition(".")[2]: path for path in reversed(known) if "." in path} if "." not in key else {}
    close = difflib.get_close_matches(flat[:100], spelled, n=1)
    if close:
        return f" (did you mean {dashes + spelled[close[0]]!r}?)"
    return f"; known: {', '.join(known)}" if len(known) <= 12 else f"; --help-all lists all {len(known)}"


def outline(settings: Any) -> dict[str, Any]:
    """Every setting's dotted name and type, in order; a group that may be null stands before its fields."""
    found: dict[str, Any] = {}
    for name, annotation in field_types(settings).items():
        nested = nested_type(annotation)
        if nested is None or NoneType in members_of(annotation):
            found[name] = annotation
        if nested is not None:
            found |= {f"{name}.{inner}": kind for inner, kind in outline(nested).items()}
    return found


def _fitting(annotation: Any, value: Any, key: str) -> Any:
    """``value`` as the type that a field declares: names become choices, lists tuples, mappings groups.

    Raises:
        Misfit: it is of another type.
    """
    members = members_of(annotation)
    if annotation is Any or (value is None and NoneType in members):
        return value
    for kind in members:
        if get_origin(kind) is tuple and isinstance(value, list | tuple):
            return tuple(_fitting(get_args(kind)[0], one, key) for one in value)
        if get_origin(kind) is Mapping and isinstance(value, Mapping):
            return {str(name): _fitting(get_args(kind)[1], one, f"{key}.{name}") for name, one in value.items()}
        if not isinstance(kind, type):
            continue
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            return _made(kind, value, key)
        if issubclass(kind, Enum) and isinstance(value, str):
            return _choice(kind, value, key)
        if kind is float and (read := _as_float(value)) is not None:
            return read
        if isinstance(value, kind) and isinstance(value, bool) is (kind is bool):  # True is no number
            return value
    raise Misfit(key, value, annotation)


def _made(kind: type[Any], value: Mapping[str, Any], key: str) -> Any:
    if issubclass(kind, Settings):
        return build(kind, value, source=key)
    types = field_types(kind)
    fitting = {name: _fitting(types[name], one, f"{key}.{name}") for name, one in value.items()}
    try:
        return kind(**fitting)
    except ValueError as error:
        raise ConfigError(f"{key}.{error}") from error


def _as_float(value: Any) -> float | None:
    """A number; also ``1e-4``, which YAML takes for text because it has no point."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not re.match(r"[+-]?\d[\d.]*[eE]", value):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _choice(choices: type[Enum], value: str, key: str) -> Enum:
    known = [str(member.value) for member in choices]
    if str(value) in known:
        return choices(value)
    raise ConfigError(f"{key}={value!r} is unknown{did_you_mean(value, known)}; expected {describe(choices)}")


def describe(annotation: Any) -> str:
    """A type in words: ``a whole number``, ``one of sampled, full, topk``."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    words = []
    for kind in members_of(annotation):
        if isinstance(kind, type) and issubclass(kind, Enum):
            words.append("one of " + ", ".join(str(member.value) for member in kind))
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            words.append(f"a mapping of {', '.join(field_types(kind))}")
        elif get_origin(kind) is tuple:
            words.append("a list of names")
        else:
            numbers = float in get_args(kind)
            words.append(names.get(kind, "a mapping of keys to " + ("numbers" if numbers else "values")))
    return " or ".join(words)


def to_dict(settings: Any) -> dict[str, Any]:
    """``settings`` as plain values: what YAML and JSON can hold, and ``build`` reads back."""
    return {name: _plain(getattr(settings, name)) for name in field_types(type(settings))}


def changed(settings: AnySettings, values: Mapping[str, Any]) -> AnySettings:
    """``settings`` with other values by dotted name: ``changed(config, {"run.seed": 1, "objective.mode": "opd"})``.

    Raises:
        ConfigError: as ``build``.
    """
    plain = to_dict(settings)
    for key, value in values.items():
        *groups, last = key.split(".")
        place = plain
        for group in groups:
            place[group] = dict(place.get(group) or {})
            place = place[group]
        place[last] = value
    return build(type(settings), plain)


def flat_dict(settings: Settings) -> dict[str, Any]:
    """Plain values by dotted name; those of a group that is null are left out."""
    found: dict[str, Any] = {}
    for name in field_types(type(settings)):
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= {f"{name}.{inner}": _plain(one) for inner, one in to_dict(value).items()}
        else:
            found[name] = _plain(value)
    return found


def to_yaml(settings: Any) -> str:
    """``settings`` as YAML text, in the order of the fields."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True, width=110)


def fingerprint(settings: Settings, *, without: Sequence[str] = ()) -> str:
    """A short hash of the settings: equal for equal values, whatever file or option they came from.

    Args:
        settings: any.
        without: dotted names of what changes nothing in the result, such as the output folder.
    """
    values = {name: value for name, value in flat_dict(settings).items() if name not in without}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


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


def field_types(settings: Any) -> dict[str, Any]:
    """Name and type of every field of a dataclass."""
    hints = get_type_hints(settings)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings)}


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of ``X | None``; the type itself otherwise."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def nested_type(annotation: Any) -> Any:
    """The dataclass among the alternatives of a field's type, or None."""
    return next((t for t in members_of(annotation) if isinstance(t, type) and dataclasses.is_dataclass(t)), None)
