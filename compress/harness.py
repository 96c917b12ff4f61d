"""Tasks of the lm-evaluation-harness as measures of a language model: `lm_eval.piqa`, or a task's own YAML file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from compress.errors import CompressError, did_you_mean
from compress.metrics import TASK
from compress.sections import Validation

FILE = (".yaml", ".yml")
PRIMARY = ("acc_norm", "acc", "exact_match")
MENDABLE = (ImportError, LookupError, OSError, TypeError, ValueError, yaml.YAMLError)  # of a task or its dataset


def check_tasks(section: Validation | None, model, processor) -> None:
    """Refuse tasks that cannot be measured on this model before any work is done on it."""
    tasks = tasks_of(section)
    if not tasks:
        return
    generates = getattr(model, "can_generate", None)
    if not (generates and generates()):
        raise CompressError(f"validate: {tasks[0]} measures language models, {type(model).__name__} generates no text")
    if tokenizer_of(processor) is None:
        raise CompressError(f"validate: {tasks[0]} needs a tokenizer, none is saved with the model")
    for name in tasks:
        manager = _manager(name)
        with _quietly(), _mendable(name):
            manager.load([_task(name, manager)])


def scores(section: Validation | None, model, processor) -> dict[str, float]:
    """The primary metric of each task that is named, over its first `samples` examples."""
    found = {name: evaluate(name, model, processor, section.samples, section.batch) for name in tasks_of(section)}
    return {name: primary(name, *measured) for name, measured in found.items()}


def tasks_of(section: Validation | None) -> list[str]:
    """The names among the limits that are tasks."""
    return [name for name in section.limits if name.startswith(TASK)] if section else []


def evaluate(name: str, model, processor, samples: int, batch: int) -> tuple[dict[str, Any], dict[str, bool]]:
    """What the harness measured on one task by `metric,filter`, and which metrics are better when higher."""
    manager = _manager(name)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _quietly(), _mendable(name):
        task = _task(name, manager)
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer_of(processor), batch_size=batch),
            tasks=[task], task_manager=manager, limit=samples, log_samples=False, bootstrap_iters=0,
        )  # fmt: skip
    title = task["task"] if isinstance(task, dict) else task
    return found["results"].get(title, {}), found["higher_is_better"].get(title, {})


def primary(name: str, row: dict[str, Any], higher: dict[str, bool]) -> float:
    """The accuracy of a task, normalized by length where there is such a one; else its first metric."""
    values: dict[str, float] = {}
    for key, value in row.items():
        metric, filtered, _ = key.partition(",")
        if filtered and isinstance(value, float | int) and not metric.endswith("_stderr"):
            values.setdefault(metric, value)
    chosen = next((metric for metric in (*PRIMARY, *values) if metric in values), None)
    if chosen is None:
        raise CompressError(f"validate: {name} has no score of its own (a tag of several tasks?); name a single task")
    if not higher.get(chosen, True):
        raise CompressError(f"validate: {name} measures {chosen}, which is better when lower; use perplexity")
    return float(values[chosen])


def tokenizer_of(processor):
    """The tokenizer in a processor, or None."""
    found = getattr(processor, "tokenizer", processor)
    return found if hasattr(found, "convert_tokens_to_ids") else None


def _manager(name: str):
    """The harness's index of tasks; empty for a task in a file, since to read them all takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CompressError(
            f"validate: {name} needs the lm-evaluation-harness ({error}); run: pip install transformer-compress[eval]"
        ) from error
    with _quietly():
        return TaskManager(include_defaults=not name.endswith(FILE))


def _task(name: str, manager) -> str | dict[str, Any]:
    """A task that the harness knows by name, or the content of a task's file; such a file is data, not code."""
    title = name.removeprefix(TASK)
    if not title.endswith(FILE):
        if title not in manager.all_tasks:
            raise CompressError(
                f"validate: {name}: the harness has no such task{did_you_mean(title, manager.all_tasks)}"
            )
        return title
    config = yaml.safe_load(Path(title).read_text("utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise CompressError(f"validate: {title} is no task of the harness, it must be a mapping with the key task")
    return config


@contextmanager
def _mendable(name: str) -> Iterator[None]:
    """A complaint of the harness about a task or its dataset, in one line."""
    try:
        yield
    except MENDABLE as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CompressError(f"validate: {name} cannot be measured: {type(error).__name__}: {reason}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """The harness draws bars and logs its defaults, which belong on a terminal only."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if sys.stderr.isatty():
            yield
        else:
            with redirect_stderr(StringIO()):
                yield
    finally:
        logger.setLevel(level)
