"""From a typed, documented function to the JSON Schema of its arguments.

Worked example::

    def convert(amount: float, to: Literal["EUR", "USD"] = "EUR") -> float:
        '''Converts an amount of pounds sterling.

        Args:
            amount: how many pounds.
            to: currency of the result.
        '''

    read_signature(convert).parameters
    # {"type": "object",
    #  "properties": {"amount": {"type": "number", "description": "how many pounds."},
    #                 "to": {"type": "string", "enum": ["EUR", "USD"],
    #                        "description": "currency of the result.", "default": "EUR"}},
    #  "required": ["amount"], "additionalProperties": False}

Hints that have a JSON Schema: ``str int float bool``, ``list[X]``, ``dict[str, X]``, ``Literal``, ``Enum``
with text or whole-number values, ``X | Y`` and ``Optional``, ``TypedDict``, dataclasses, and
``Annotated[X, "description"]``.

JSON Schema counts 3.0 as an integer, so a student may write it for an ``int``; the function gets 3. In the same way it
gets the ``Enum`` member or the dataclass that it asked for, not the JSON that the student wrote.

Test it alone: ``pytest tests/tools/test_tool_schema.py``
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from typing import Any, Literal, NotRequired, Required, Union

from opd_env.errors import did_you_mean

JSONSchema = dict[str, Any]
Convert = Callable[[Any], Any]

_SIMPLE: dict[object, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?|Attributes|References):\s*")
_ENTRY = re.compile(r"\*{0,2}(\w+)(?:\s*\([^)]*\))?:(?:\s+|$)(.*)")


@dataclasses.dataclass(frozen=True)
class Injected:
    """Marks a parameter that the kit fills in and a model does not see: ``Annotated[Client, Injected(connect)]``."""

    make: Callable[[], Any]
    """Makes the value of an episode, at its first call of the tool; see ``Tool.injected``."""


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a function's hints and docstring say."""

    description: str
    parameters: JSONSchema
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Turns JSON arguments that fit the schema into the keyword arguments that the function expects."""
    injected: dict[str, Callable[[], Any]]
    """What makes the parameters that are marked as ``Injected``, by name."""


@dataclasses.dataclass(frozen=True)
class _Type:
    schema: JSONSchema
    convert: Convert | None = None
    """None when the JSON value is passed as it is."""


def read_signature(function: Callable[..., Any], hidden: Collection[str] = ()) -> Signature:
    """Reads the schema of a function; ``hidden`` are parameters that the kit fills in and a model does not see.

    Raises:
        ValueError: the function is no complete description of a tool; the message lists all that is missing.
    """
    problems: list[str] = []
    description, documented = parse_docstring(inspect.getdoc(function) or "")
    if not description:
        problems.append("its docstring must start with a description, which the model reads")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ValueError(f"a type hint cannot be resolved ({error}); define that type at module level") from error
    parameters = inspect.signature(function).parameters
    injected = {name: mark.make for name, hint in hints.items() if (mark := _mark(hint)) is not None}
    visible = [name for name in parameters if name not in hidden and name not in injected]
    for name in hidden:
        if name not in parameters:
            problems.append(f"parameter {name!r} must exist to receive what the kit puts in")
    for name in documented:
        if name not in parameters:
            problems.append(f"the docstring describes {name!r}, which is no parameter{did_you_mean(name, visible)}")
    properties: JSONSchema = {}
    converts: dict[str, Convert] = {}
    required = []
    for name in visible:
        try:
            kind = _parameter_type(parameters[name], hints)
            note = kind.schema.get("description") or documented.get(name)
            if not note:
                places = "under 'Args:' in the docstring, or Annotated[..., 'description']"
                raise ValueError(f"needs a description: {places}")
            properties[name] = {**kind.schema, "description": note}
            if kind.convert is not None:
                converts[name] = kind.convert
            if parameters[name].default is inspect.Parameter.empty:
                required.append(name)
            else:
                properties[name]["default"] = _json_default(parameters[name].default, kind.schema)
        except ValueError as error:
            problems.append(f"parameter {name!r} {error}")
    if problems:
        raise ValueError("; ".join(problems))
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return Signature(description, schema, _convert_fields(converts) or dict, injected)


def parse_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """Splits a Google docstring into its description and the descriptions of the arguments.

    Line breaks inside a paragraph become spaces, paragraphs stay apart. Unlike the package ``docstring_parser``, it
    takes any text: a tool is not refused for an odd line under ``Raises:``.
    """
    description: list[str] = []
    arguments: dict[str, str] = {}
    section, indent, current = "", 0, ""
    for line in inspect.cleandoc(docstring).splitlines():
        text = line.strip()
        if _SECTION.fullmatch(line):
            section, indent, current = text.rstrip(":"), 0, ""
        elif not section:
            description.append(text)
        elif section in ("Args", "Arguments", "Parameters") and text:
            depth = len(line) - len(line.lstrip())
            indent = indent or depth
            entry = _ENTRY.fullmatch(text) if depth == indent else None
            if entry:
                current, text = entry[1], entry[2]
                arguments[current] = text
            elif current:
                arguments[current] = f"{arguments[current]} {text}".strip()
    paragraphs = "\n".join(description).strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs), arguments


def _mark(hint: Any) -> Injected | None:
    notes = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
    return next((note for note in notes if isinstance(note, Injected)), None)


def _parameter_type(parameter: inspect.Parameter, hints: Mapping[str, Any]) -> _Type:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise ValueError("is *args or **kwargs, which no schema describes; name every parameter")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise ValueError("is positional-only, but arguments are passed by name; drop the '/'")
    if parameter.name not in hints:
        raise ValueError(f"needs a type hint, such as {parameter.name}: str")
    return _type_of(hints[parameter.name], ())


def _type_of(hint: Any, inside: tuple[Any, ...]) -> _Type:
    """The schema of one hint; ``inside`` holds the records that contain it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SIMPLE:
        return _Type({"type": _SIMPLE[hint]}, int if hint is int else None)
    if origin is typing.Annotated:
        kind = _type_of(arguments[0], inside)
        notes = [note for note in arguments[1:] if isinstance(note, str)]
        return dataclasses.replace(kind, schema={**kind.schema, "description": notes[0]}) if notes else kind
    if origin is Literal:
        return _choice(list(arguments), None)
    if origin in (Union, types.UnionType):
        return _union([_type_of(argument, inside) for argument in arguments])
    if hint is list or origin is list:
        items = _type_of(arguments[0], inside) if arguments else _Type({})
        convert = items.convert
        schema = {"type": "array", **({"items": items.schema} if arguments else {})}
        return _Type(schema, None if convert is None else lambda values: [convert(value) for value in values])
    if hint is dict or (origin is dict and arguments[0] is str):
        values = _type_of(arguments[1], inside) if arguments else _Type({})
        change = values.convert
        schema = {"type": "object", **({"additionalProperties": values.schema} if arguments else {})}
        return _Type(schema, None if change is None else lambda pairs: {key: change(pairs[key]) for key in pairs})
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _choice([member.value for member in hint], hint)
    if typing.is_typeddict(hint) or (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        if hint in inside:
            raise ValueError(f"has the hint {hint.__name__}, which contains itself")
        return _record(hint, (*inside, hint))
    raise ValueError(
        f"has the hint {_name(hint)}, which has no JSON Schema here; use str, int, float, bool, list[...], "
        "dict[str, ...], Literal, Enum, TypedDict, a dataclass or a union of these, "
        "or give Tool(...) a schema of your own"
    )


def _choice(values: list[Any], convert: Convert | None) -> _Type:
    kinds = {type(value) for value in values}
    if not kinds <= _SIMPLE.keys() - {float}:
        raise ValueError(f"has choices that are neither text, whole numbers, booleans nor None: {values!r}")
    schema: JSONSchema = {"enum": values}
    if len(kinds) == 1:
        schema = {"type": _SIMPLE[kinds.pop()], **schema}
    return _Type(schema, convert or (_whole if int in kinds or schema.get("type") == "integer" else None))


def _union(members: list[_Type]) -> _Type:
    schemas = [member.schema for member in members]
    if all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        names = [schema["type"] for schema in schemas]
        schema: JSONSchema = {"type": names[0] if len(set(names)) == 1 else names}
    else:
        schema = {"anyOf": schemas}
    others = [member for member in members if member.schema != {"type": "null"}]
    converts = [member.convert for member in others if member.convert is not None]
    if not converts or {"type": "number"} in schemas:
        return _Type(schema)
    if all(convert in (int, _whole) for convert in converts):
        return _Type(schema, _whole)
    if len(others) > 1:
        raise ValueError("is a union of an Enum, a list or a record with something else, which cannot be told apart")
    convert = converts[0]
    return _Type(schema, lambda value: None if value is None else convert(value))


def _record(hint: Any, inside: tuple[Any, ...]) -> _Type:
    """A TypedDict or a dataclass: an object with named fields."""
    hints = typing.get_type_hints(hint, include_extras=True)
    if typing.is_typeddict(hint):
        make: Convert | None = None
        required = set(hint.__required_keys__)
        for name, field in list(hints.items()):
            if typing.get_origin(field) in (Required, NotRequired):
                # Under `from __future__ import annotations`, __required_keys__ does not see these marks.
                (required.add if typing.get_origin(field) is Required else required.discard)(name)
                hints[name] = typing.get_args(field)[0]
    else:
        make = lambda fields: hint(**fields)  # noqa: E731
        fields = [field for field in dataclasses.fields(hint) if field.init]
        empty = dataclasses.MISSING
        required = {field.name for field in fields if field.default is empty and field.default_factory is empty}
        hints = {field.name: hints[field.name] for field in fields}
    kinds = {name: _type_of(field, inside) for name, field in hints.items()}
    schema = {
        "type": "object",
        "properties": {name: kind.schema for name, kind in kinds.items()},
        "required": [name for name in hints if name in required],
        "additionalProperties": False,
    }
    return _Type(schema, _convert_fields({n: k.convert for n, k in kinds.items() if k.convert is not None}, make))


def _convert_fields(converts: Mapping[str, Convert], make: Convert | None = None) -> Convert | None:
    """Applies each field's conversion, then ``make`` to the whole; None when there is nothing to do."""
    if not converts and make is None:
        return None

    def convert(fields: Mapping[str, Any]) -> Any:
        values = {name: converts[name](value) if name in converts else value for name, value in fields.items()}
        return values if make is None else make(values)

    return convert


def _whole(value: Any) -> Any:
    """3.0 as 3; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _json_default(default: Any, schema: JSONSchema) -> Any:
    from jsonschema import Draft202012Validator

    if isinstance(default, list | dict | set):
        raise ValueError(f"has the default {default!r}, which all calls would share; use None or leave it out")
    value = default.value if isinstance(default, Enum) else default
    is_json = isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))
    if not is_json or not Draft202012Validator(schema).is_valid(value):
        raise ValueError(f"has the default {default!r}, which does not fit its type hint")
    return value


def _name(hint: Any) -> str:
    return hint.__qualname__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
