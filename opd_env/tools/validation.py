"""Checks a student's arguments against a tool's schema, and says everything that is wrong at once.

Worked example::

    check_arguments(validator, {"qurey": "Kabul", "k": "5"})
    # ToolError: schema: unknown argument 'qurey' (did you mean 'query'?); missing argument 'query';
    #            k: got "5" (string), expected integer

Test it alone: ``pytest tests/tools/test_tool_validation.py``
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from opd_env.errors import did_you_mean
from opd_env.tools.tool_error import ToolError, ToolErrorKind, cut

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator, ValidationError

MAX_SCHEMA_SIZE = 100_000
"""Schemas, references written out, in the parameters of one tool; more could take minutes to check."""
MAX_PROBLEMS = 10
"""Problems listed in one message; of the others only the number is said."""

_REFERENCES = ("$ref", "$dynamicRef")
_IN_PLACE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else")
_SHOWN_CHARS = 80
_TOO_DEEP = "they are nested too deeply"
_LIMITS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "more than {}",
    "exclusiveMaximum": "less than {}",
    "multipleOf": "a multiple of {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "pattern": "text that matches {}",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "uniqueItems": "items that all differ",
    "minProperties": "at least {} fields",
    "maxProperties": "at most {} fields",
}
_TYPE_NAMES: dict[type, str] = {
    bool: "boolean", str: "string", int: "integer", float: "number", type(None): "null", list: "array", dict: "object",
}  # fmt: skip


def make_validator(schema: Mapping[str, Any]) -> Draft202012Validator:
    """A validator that never looks outside the schema, and whose checks end.

    Raises:
        ValueError: the schema is no JSON Schema (Draft 2020-12) of an object, or refers to what it does not hold.
    """
    from jsonschema import Draft202012Validator, SchemaError
    from referencing import Registry, exceptions
    from referencing.jsonschema import DRAFT202012

    try:
        Draft202012Validator.check_schema(schema)
        resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
        for reference in _references(schema):
            resolver.lookup(reference)
    except SchemaError as error:
        where = "/".join(str(part) for part in error.absolute_path) or "top level"
        message = f"its parameters are no JSON Schema (Draft 2020-12): {where}: {error.message[:300]}"
        raise ValueError(message) from error
    except (exceptions.Unresolvable, exceptions.Unretrievable) as error:
        raise ValueError(f"its parameters refer to {reference!r}, which they do not hold") from error
    except RecursionError as error:
        raise ValueError("its parameters are nested too deeply") from error
    if schema.get("type") != "object":
        raise ValueError(f"its parameters have type {schema.get('type')!r}, expected 'object' (one field per argument)")

    def follow(reference: str) -> object:
        return resolver.lookup(reference).contents

    _check_ends(schema, follow)
    if _size(schema, follow, {}) > MAX_SCHEMA_SIZE:
        raise ValueError(f"its parameters, with all references written out, hold more than {MAX_SCHEMA_SIZE} schemas")
    return Draft202012Validator(schema, registry=Registry())


def _check_ends(schema: object, follow: Callable[[str], object]) -> None:
    """Refuses references that lead back to themselves for one and the same value."""
    checked: set[str] = set()

    def visit(reference: str, before: frozenset[str]) -> None:
        if reference in before:
            raise ValueError(f"its parameters refer to themselves without end, by {reference!r}")
        if reference not in checked:
            for further in _in_place(follow(reference)):
                visit(further, before | {reference})
            checked.add(reference)

    for reference in _references(schema):
        visit(reference, frozenset())


def _in_place(schema: object) -> Iterator[str]:
    """References to what else the same value must fit."""
    if isinstance(schema, Mapping):
        yield from (schema[key] for key in _REFERENCES if isinstance(schema.get(key), str))
        for key in _IN_PLACE:
            yield from _in_place(schema.get(key))
        for dependent in dict(schema.get("dependentSchemas", {})).values():
            yield from _in_place(dependent)
    elif isinstance(schema, list):
        for one in schema:
            yield from _in_place(one)


def _size(schema: object, follow: Callable[[str], object], known: dict[str, int]) -> int:
    """Schemas to look at in the worst case. A few references to references may mean billions."""
    if isinstance(schema, list):
        return sum(_size(one, follow, known) for one in schema)
    if not isinstance(schema, Mapping):
        return 0
    size = 1 + sum(_size(value, follow, known) for value in schema.values())
    for reference in _references({key: schema[key] for key in _REFERENCES if key in schema}):
        if reference not in known:
            known[reference] = 1  # within itself: as often as the arguments are deep
            known[reference] = _size(follow(reference), follow, known)
        size += known[reference]
    return size


def _references(schema: object) -> Iterator[str]:
    if isinstance(schema, Mapping):
        yield from (schema[key] for key in _REFERENCES if isinstance(schema.get(key), str))
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def check_arguments(validator: Draft202012Validator, arguments: object) -> dict[str, Any]:
    """Checks arguments and returns a copy of them that the tool may change.

    Args:
        validator: of the tool's parameters.
        arguments: what the student wrote, parsed. Booleans are no integers; 3.0 is one (JSON Schema says so).

    Raises:
        ToolError: ``not_an_object``, or ``schema`` with all problems, in the order of their paths; ``exception`` when
            it is the schema that cannot be used.
    """
    from referencing.exceptions import Unresolvable

    if not isinstance(arguments, Mapping):
        message = f"arguments: got {_show(arguments)}, expected an object with the arguments by name"
        raise ToolError(ToolErrorKind.NOT_AN_OBJECT, message)
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        reason = _TOO_DEEP if isinstance(error, RecursionError) else "NaN, Infinity and cycles are none"
        raise ToolError(ToolErrorKind.SCHEMA, f"the arguments are no JSON values: {reason}") from error
    try:
        problems = sorted(_problems(validator.iter_errors(copy)))
    except RecursionError as error:
        raise ToolError(ToolErrorKind.SCHEMA, f"the arguments cannot be checked: {_TOO_DEEP}") from error
    except OverflowError as error:  # multipleOf with a fraction
        raise ToolError(ToolErrorKind.SCHEMA, "the arguments cannot be checked: a number is too large") from error
    except Unresolvable as error:  # below a further $id, where make_validator did not look
        message = "the tool's parameters refer to what they do not hold"
        raise ToolError(ToolErrorKind.EXCEPTION, message) from error
    if problems:
        texts = [text for _, text in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            texts.append(f"and {len(problems) - MAX_PROBLEMS} more problems")
        raise ToolError(ToolErrorKind.SCHEMA, "; ".join(texts))
    return copy


def _problems(errors: Iterator[ValidationError]) -> Iterator[tuple[str, str]]:
    """(path, text) of every problem; the path orders them."""
    for error in errors:
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        path = cut(path.removeprefix("."), 200)
        prefix = f"{path}: " if path else ""
        rule, limit, instance = str(error.validator), cast("Any", error.validator_value), cast("Any", error.instance)
        if rule == "required":
            # One error for each missing name, which only the message tells.
            name = next(name for name in limit if error.message.startswith(f"{name!r} "))
            yield path, f"{prefix}missing argument {name!r}"
        elif rule == "additionalProperties" and limit is False:
            schema = cast("dict[str, Any]", error.schema)
            known, patterns = list(schema.get("properties", {})), schema.get("patternProperties", {})
            for name in instance:
                if name not in known and not any(re.search(pattern, name) for pattern in patterns):
                    free = [choice for choice in known if choice not in instance]
                    hint = did_you_mean(name, free) or f"; known: {', '.join(known) or 'none'}"
                    yield path, f"{prefix}unknown argument {cut(repr(name), _SHOWN_CHARS)}{hint}"
        else:
            expected = _expected(rule, limit, error.message)
            yield path, f"{prefix or 'arguments: '}got {_show(instance)}, expected {expected}"


def _expected(rule: str, limit: Any, message: str) -> str:
    if rule == "type":
        return limit if isinstance(limit, str) else " or ".join(limit)
    if rule == "enum":
        return "one of " + cut(", ".join(json.dumps(choice, ensure_ascii=False) for choice in limit), 400)
    if rule == "const":
        return json.dumps(limit, ensure_ascii=False)
    if rule in ("anyOf", "oneOf"):
        schemas = [schema for schema in limit if isinstance(schema, Mapping)]  # not plain true or false
        choices = [
            _expected("enum", schema["enum"], "") if "enum" in schema else str(schema.get("type", "another form"))
            for schema in schemas
        ]
        return " or ".join(choices) or "another form"
    return _LIMITS[rule].format(limit) if rule in _LIMITS else f"what the schema says ({cut(message, 200)})"


def _show(value: object) -> str:
    """A value as JSON with its type, cut to a readable length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):
        text = type(value).__name__
    return f"{cut(text, _SHOWN_CHARS)} ({_TYPE_NAMES.get(type(value), type(value).__name__)})"
