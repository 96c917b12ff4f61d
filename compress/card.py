"""The model card: README.md of an emitted folder, written from its report."""

from __future__ import annotations

import re
from math import isfinite
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from compress.measure import PHYSICAL
from compress.report import LEDGER, MEASURES, Report

PLACE = "path/to/this/folder"  # `push` writes the repository's name here
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?", re.ASCII)  # what the hub's metadata takes for models and datasets
TASKS = {  # the hub's task of a loader, where the loader alone decides it
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}


def card(
    report: Report,
    recipe: str,
    *,
    library: str,
    loader: str,
    component: str | None = None,
    dtype: str | None = None,
    task: str | None = None,
    license: str | None = None,
    dataset: str | None = None,
) -> str:
    """README.md: `recipe` is its text to the letter, `loader` the class of `library` whose from_pretrained takes it.

    `component` is the part of a diffusers pipeline that was compressed, `dtype` one that loading must be told.
    """
    task = task or TASKS.get(loader)
    parts = [
        f"---\n{_metadata(report, library, task, license, dataset)}\n---",
        f"# {_plain(report.model)}, compressed",
        f"Made from {_plain(report.model)} with `compress` and the recipe below."
        " Every number on this page was measured on the hardware named at its end.",
        _verdict(report),
        "## Before and after" + (f" on {_plain(dataset)}" if dataset else ""),
        _table(MEASURES, report.measure_rows()),
        *[f"* {_plain(line)}" for line in report.remarks()],
        "## Load it",
        _loading(report.format, library, loader, component, dtype),
        f"Format: **{_plain(report.format)}**, {_plain(report.why_format)}.",
        "## What each step did",
        "Size, FLOPs and error are those of the model after the step; the error is relative to the original's answers.",
        _table(LEDGER, report.step_rows()),
        "## Recipe",
        fenced(recipe, "yaml"),
        "## Where this was measured",
        _table(("what", "which"), [*report.hardware.items(), *report.versions.items(), ("created", report.created)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text}{'' if text.endswith(chr(10)) else chr(10)}{fence}"


def _metadata(report: Report, library: str, task: str | None, license: str | None, dataset: str | None) -> str:
    methods = [step["use"] for step in report.steps]
    known = _on_hub(report.model)
    relation = "quantized" if any(use.startswith("quantize.") for use in methods) else "finetune"
    results = _results(report, task, dataset) or None
    return ModelCardData(
        base_model=report.model if known else None,
        base_model_relation=relation if known else None,
        library_name=library,
        pipeline_tag=task,
        license=license,
        tags=["compress", *methods],
        eval_results=results,
        model_name=f"{report.model}, compressed" if results else None,
    ).to_yaml()


def _results(report: Report, task: str | None, dataset: str | None) -> list[EvalResult]:
    """The qualities after compression, for the hub's model-index, which needs a task and a dataset of the hub."""
    if not (task and dataset and _on_hub(dataset)):
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=measure.name,
            metric_value=measure.after,
        )
        for measure in report.measures
        if measure.unit not in PHYSICAL and measure.after is not None and isfinite(measure.after)
    ]


def _on_hub(name: str) -> bool:
    """Can this be a name on the hub? What lies here is no such name, even if it looks like one."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _verdict(report: Report) -> str:
    lines = [f"Reload check: {_plain(report.verdict())}."]
    for measure in report.missed:
        lines.append(
            f"**Missed limit: {_plain(measure.name)} is {_plain(measure.text('after'))},"
            f" the recipe asked for {_plain(measure.limit or '')}.**"
        )
    return "\n\n".join(lines)


def _loading(format: str, library: str, loader: str, component: str | None, dtype: str | None) -> str:
    cast, torch = (f", dtype=torch.{dtype}", "import torch\n") if dtype else ("", "")
    load = f'{torch}from {library} import {loader}\n\nmodel = {loader}.from_pretrained("{PLACE}"{cast})'
    if format == "native":
        return fenced(load, "python") + "\n\nNothing but the library is needed."
    if format == "compressed-tensors":
        return fenced(load, "python") + "\n\nThe package `compressed-tensors` must be installed."
    return "\n\n".join(
        (
            "With `pip install transformer-compress`:",
            fenced(f"import compress  # teaches {library} to load this\n{load}", "python"),
            "Without it, by the code in this repository:",
            fenced(_untaught(library, loader, component, cast, torch), "python"),
        )
    )


def _untaught(library: str, loader: str, component: str | None, cast: str, torch: str) -> str:
    """How to load without compress; in diffusers only AutoModel looks for code, and not in the parts of a pipeline."""
    if component is None:
        loader = "AutoModel" if library == "diffusers" else loader
        call = f'{loader}.from_pretrained("{PLACE}"{cast}, trust_remote_code=True)'
        return f"{torch}from {library} import {loader}\n\nmodel = {call}"
    return f"""import os

{torch}from diffusers import AutoModel, {loader}
from huggingface_hub import snapshot_download

folder = "{PLACE}"
folder = folder if os.path.isdir(folder) else snapshot_download(folder)
part = AutoModel.from_pretrained(f"{{folder}}/{component}"{cast}, trust_remote_code=True)
model = {loader}.from_pretrained(folder, {component}=part{cast})"""


def _table(columns, rows) -> str:
    lines = [columns, ["---"] * len(columns), *[[_plain(str(cell)) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line, also within a table."""
    return re.sub(r"([\\`*|\[\]<&~]|\b_|_\b)", r"\\\1", " ".join(text.split()))
