"""Checks a mapping of a recipe against a pydantic model and says in our words what is wrong with it."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from compress.errors import CompressError, did_you_mean, one_of
from compress.marks import Page, show, word

Model = TypeVar("Model", bound=BaseModel)
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
RANGE = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "left out",
}


def fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model by the name they have in a recipe."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def unknown(page: Page, path: tuple, where: str, choices) -> None:
    """Refuse the last key of `path`, which is none of the choices."""
    key = word(path[-1])
    message = f"{where}: {key} is no key here{did_you_mean(path[-1], choices)} (keys: {one_of(choices, 40)})"
    page.refuse(path, message, page.keys[path])


def check(page: Page, model: type[Model], data: Any, path: tuple, where: str) -> Model | None:
    """An instance of `model` from the mapping at `path`, or None when its mistakes went to the page."""
    if not isinstance(data, dict):
        page.refuse(path, f"{where}: it is {show(data)}, it must be a mapping (keys: {one_of(fields(model), 40)})")
        return None
    for key in data:
        if key not in fields(model):
            unknown(page, (*path, key), where, fields(model))
    known = {key: value for key, value in data.items() if key in fields(model)}
    try:
        return model.model_validate_json(json.dumps(known), strict=True)
    except ValidationError as error:
        for at, message in _mistakes(model, known, error):
            page.refuse((*path, *at), f"{where}: {message}")
    except CompressError as error:
        page.refuse(path, f"{where}: {error}")
    return None


def _mistakes(model: type[BaseModel], data: dict, error: ValidationError) -> list[tuple[tuple, str]]:
    """One message per place; a union complains once for each of its members, which together are the choices."""
    messages, wanted = [], {}
    for mistake in error.errors(include_url=False):
        path, value = _walk(data, mistake["loc"])
        if mistake["type"] == "missing":
            messages.append((path, f"{_dotted((*path, mistake['loc'][-1]))} is missing"))
        elif mistake["type"] in ("value_error", "assertion_error"):
            subject = f"{_dotted(path)} is {show(value)}: " if path else ""
            messages.append((path, subject + str(mistake["ctx"]["error"])))
        else:
            field = fields(model)[path[0]] if len(path) == 1 else None
            wanted.setdefault(path, (value, []))[1].append(_must(field, mistake))
    for path, (value, musts) in wanted.items():
        hint = did_you_mean(value, re.findall(r"'([^']*)'", " ".join(musts))) if isinstance(value, str) else ""
        must = " or ".join(dict.fromkeys(musts)).replace("'", "")
        messages.append((path, f"{_dotted(path)} is {show(value)}, it must be {must}{hint}"))
    return messages


def _walk(data: Any, loc: tuple) -> tuple[tuple, Any]:
    """The part of a location that is in the data: pydantic's also names the members of unions."""
    path = ()
    for part in loc:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if inside:
            path, data = (*path, part), data[part]
    return path, data


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _must(field: FieldInfo | None, mistake: dict) -> str:
    """What a value must be, from the type of pydantic's error; the field knows its whole range, the error one end."""
    kind, context = mistake["type"], mistake.get("ctx", {})
    ends = {
        end: getattr(bound, end) for bound in (field.metadata if field else ()) for end in BOUNDS if hasattr(bound, end)
    }
    if kind in RANGE:
        ends = ends or {RANGE[kind]: context[RANGE[kind]]}
        return _range(ends)
    if kind in ("int_type", "float_type"):
        return f"{KINDS[kind]} {_range(ends)}".rstrip()
    if kind in ("string_type", "string_pattern_mismatch") and field and field.examples:
        return f"text like {field.examples[0]}"
    if kind in KINDS:
        return KINDS[kind]
    if kind in ("literal_error", "enum"):
        return context["expected"]
    if kind == "string_pattern_mismatch":
        return f"text like {context['pattern']}"
    if kind == "multiple_of":
        return f"a multiple of {context['multiple_of']}"
    if kind.endswith(("too_short", "too_long")):
        unit = "characters" if kind.startswith("string") else "items"
        end = f"at least {context['min_length']}" if "min_length" in context else f"at most {context['max_length']}"
        return f"{end} {unit} long"
    return mistake["msg"].removeprefix("Input should be ")


def _range(ends: dict[str, float]) -> str:
    return " and ".join(f"{BOUNDS[end]} {value}" for end, value in ends.items())
