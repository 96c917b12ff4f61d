"""A recipe: the YAML text of a run, checked to the last key before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field

from compress.check import check, fields, unknown
from compress.errors import CompressError, did_you_mean, one_of
from compress.marks import Page, Writer, show, word
from compress.metrics import METRICS, RELATIVE, TASK, TASKS
from compress.sections import LIMIT, Data, Emit, Limit, Section, Step, Validation
from compress.transform import FAMILIES, card, find, names

LARGEST = 10**6  # bytes of a recipe; someone will pass model.safetensors
KEYS = ("seed", "calibrate", "steps", "validate", "emit")


class Head(Section):
    """What stands in a recipe beside its sections."""

    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of everything random")


class Recipe(Head):
    """A checked recipe with its text to the letter; its methods are ready to plan."""

    calibrate: Data | None = None
    steps: tuple[Step, ...]
    validate_: Validation | None = Field(None, alias="validate")
    emit: Emit = Emit()
    source: str
    name: str = "recipe"

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """The recipe in a file."""
        try:
            with open(path, "rb") as file:
                raw = file.read(LARGEST + 1)
        except OSError as error:
            raise CompressError(f"{path}: {str(error.strerror).lower()}, it must be a recipe file") from None
        if len(raw) > LARGEST:
            raise CompressError(f"{path}:1:1: recipe: it has more than {LARGEST} bytes, it must be a recipe file")
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            before = raw[: error.start].split(b"\n")
            place = f"{path}:{len(before)}:{len(before[-1]) + 1}"
            raise CompressError(f"{place}: recipe: byte {raw[error.start]:#x} is not UTF-8, it must be text") from None
        return _build(Page(text, str(path)), text, Path(path).stem)

    @classmethod
    def parse(cls, text: str, name: str = "recipe") -> Recipe:
        """The recipe in a text; `name` stands for the file in messages."""
        return _build(Page(text, name), text, name)

    @classmethod
    def make(cls, data: dict[str, Any], name: str = "recipe") -> Recipe:
        """The recipe in a dict; messages give key paths instead of lines."""
        text = yaml.dump(data, Dumper=Writer, sort_keys=False, allow_unicode=True, width=120)
        return _build(Page(text, name, lines=False), text, name)


def _build(page: Page, source: str, name: str) -> Recipe:
    """The recipe on a page, or all its mistakes."""
    data = page.data
    if not isinstance(data, dict):
        page.refuse((), f"recipe: it is {show(data)}, it must be a mapping (keys: {one_of(KEYS)})")
        page.finish()
    for key in data.keys() - set(KEYS):
        unknown(page, (key,), "recipe", KEYS)
    if "steps" not in data:
        page.refuse((), "recipe: steps is missing, it must be a list of steps, each with use")
    head = check(page, Head, {key: data[key] for key in fields(Head) if key in data}, (), "recipe")
    calibrate = check(page, Data, data["calibrate"], ("calibrate",), "calibrate") if "calibrate" in data else None
    steps = _steps(page, data["steps"]) if "steps" in data else ()
    validation = _validation(page, data["validate"], ("validate",)) if "validate" in data else None
    emit = check(page, Emit, data.get("emit", {}), ("emit",), "emit")
    page.finish()
    return Recipe(
        seed=head.seed, calibrate=calibrate, steps=steps, validate_=validation, emit=emit, source=source, name=name
    )


def _steps(page: Page, data: Any) -> tuple[Step, ...]:
    """The steps with their methods; a wrong order is refused where it breaks."""
    if not isinstance(data, list) or not data:
        page.refuse(("steps",), f"recipe: steps is {show(data)}, it must be a list of steps, each with use")
        return ()
    steps, latest = [], None
    for index, item in enumerate(data):
        path = ("steps", index)
        use = _use(page, item, path)
        if use is None:
            continue
        if latest and _rank(use) < _rank(latest):
            message = f"{use}: it stands after {latest}, it must stand before (order: {', '.join(FAMILIES)})"
            page.refuse((*path, "use"), message)
        else:
            latest = use
        options = {key: value for key, value in item.items() if key != "use"}
        method = check(page, find(use), options, path, use)
        if method is not None:
            steps.append(Step(use=use, method=method, where=page.where(path)))
    return tuple(steps)


def _use(page: Page, item: Any, path: tuple) -> str | None:
    """The method that a step names, or None when the page got the mistake."""
    where, wanted = f"steps.{path[-1]}", f"(methods: {one_of(names(), 40)})"
    use = item.get("use") if isinstance(item, dict) else None
    if not isinstance(item, dict):
        page.refuse(path, f"{where}: it is {show(item)}, it must be a mapping with use {wanted}")
    elif "use" not in item:
        page.refuse(path, f"{where}: use is missing, it must name a method {wanted}")
    elif not isinstance(use, str) or use not in names():
        hint = did_you_mean(use, names()) if isinstance(use, str) else ""
        page.refuse((*path, "use"), f"{where}: use is {show(use)}, it must name a method{hint} {wanted}")
    else:
        return use
    return None


def _rank(use: str) -> int:
    return FAMILIES.index(use.split(".")[0])


def _validation(page: Page, data: Any, path: tuple) -> Validation | None:
    """The keys of `validate`: those of the data, and metrics with their limits."""
    if not isinstance(data, dict):
        page.refuse(path, f"validate: it is {show(data)}, it must be a mapping with metrics ({one_of(METRICS)})")
        return None
    samples = {key: value for key, value in data.items() if key in fields(Data)}
    metrics = {key: value for key, value in data.items() if key not in samples}
    limits = {}
    if not metrics:
        page.refuse(path, f"validate: no metric is named, it must be at least one (metrics: {one_of(METRICS)})")
    for key, value in metrics.items():
        if key not in METRICS and not re.fullmatch(TASKS, key):
            _no_metric(page, (*path, key))
            continue
        try:
            limits[key] = limit = Limit.read(value)
            if limit and limit.kind == "ratio" and key in RELATIVE:
                raise CompressError("it must be a number, for before it is 0")
        except CompressError as error:
            page.refuse((*path, key), f"validate: {key} is {show(value)}, {error}")
    checked = check(page, Validation, samples, path, "validate")
    return checked and checked.model_copy(update={"limits": limits})


def _no_metric(page: Page, path: tuple) -> None:
    """Refuse the last key of `path`, which names no metric."""
    if path[-1].startswith(TASK):
        wanted = "it must be like lm_eval.piqa or lm_eval.tasks/mine.yaml"
        page.refuse(path, f"validate: {word(path[-1])} names no task, {wanted}", page.keys[path])
    else:
        unknown(page, path, "validate", [*METRICS, f"{TASK}<task>", *fields(Data)])


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe with every method's options: what an editor completes and checks by."""
    definitions: dict[str, Any] = {}

    def part(model: type[BaseModel], **properties: Any) -> dict[str, Any]:
        made = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(made.pop("$defs", {}))
        return {**made, "properties": {**properties, **made["properties"]}}

    def step(name: str) -> dict[str, Any]:
        made = part(find(name), use={"const": name, "description": card(name).partition("\n")[0]})
        return {**made, "title": name, "required": ["use", *made.get("required", [])]}

    limit = {"anyOf": [{"type": ["number", "null"]}, {"const": True}, {"type": "string", "pattern": f"^{LIMIT}$"}]}
    metrics = {
        metric.name: {**limit, "description": f"{metric.what}; {metric.better} is better"}
        for metric in METRICS.values()
    }
    validation = part(Validation, **metrics)
    del validation["properties"]["limits"]
    task = "a task of the lm-evaluation-harness by name or YAML file; higher is better"
    validation["patternProperties"] = {f"^{TASKS}$": {**limit, "description": task}}
    steps = {"type": "array", "minItems": 1, "items": {"oneOf": [step(name) for name in names()]}}
    head = part(Head)
    head["properties"] |= {"calibrate": part(Data), "steps": steps, "validate": validation, "emit": part(Emit)}
    return {
        **head,
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of compress",
        "required": ["steps"],
        "$defs": definitions,
    }
