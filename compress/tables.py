"""What the command line prints beside reports: plans, inspections, methods and their cards."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from compress.measure import human
from compress.transform import Transform, card, find, names

if TYPE_CHECKING:
    from rich.console import Console


def print_plan(rows: list[dict[str, Any]], console: Console) -> None:
    """Every step's modules and how the model would stand after it."""
    columns = ("step", "modules", "parameters", "weights", "FLOPs", "peak memory")
    table = Table(*columns, title="Plan", title_justify="left")
    for row in rows:
        ledger = row["ledger"]
        table.add_row(
            ledger["use"],
            str(len(ledger["modules"])) if "record" in row else "",
            human(ledger["parameters"], "parameters"),
            human(ledger["bytes"], "bytes"),
            human(ledger["flops"], "FLOPs"),
            human(ledger["memory"], "bytes"),
        )
    console.print(table)
    for row in rows:
        ledger = row["ledger"]
        if "record" in row:
            console.print(Text(f"{ledger['use']} takes {', '.join(ledger['modules'])}"))
            for path, why in ledger["notes"].get("refused", {}).items():
                console.print(Text(f"{ledger['use']} leaves {path}: {why}"))
            for glob in ledger["notes"].get("idle", ()):
                console.print(Text(f"{ledger['use']}: names no module: {glob}"))


def print_inspection(parts: dict[str, Any], console: Console) -> None:
    """The parts of a model, and what each method can do to it."""
    head = f"{parts['name']}: {parts['class']} ({parts['library']})"
    console.print(Text(head, style="bold"))
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in parts["probe"].items())
    console.print(
        Text(
            f"{human(parts['parameters'], 'parameters')} parameters, {human(parts['bytes'], 'bytes')}, "
            f"{human(parts['flops'], 'FLOPs')} for {shapes}; "
            f"{len(parts['blocks'])} blocks, {parts['linears']} linear layers"
        )
    )
    table = Table("attentions", "heads", "kv heads", "head dim", "kind", "heads cannot be removed because")
    kinds = Counter(
        (a.heads, a.kv_heads, a.head_dim, "cross" if a.cross else "causal" if a.causal else "full", a.refusal)
        for a in parts["attentions"]
    )
    for (heads, groups, dim, kind, why), number in kinds.items():
        table.add_row(str(number), str(heads), str(groups), str(dim), kind, why)
    console.print(table)
    table = Table("MLPs", "width", "gate and value in one", "width cannot be cut because")
    for (width, fused, why), number in Counter((m.width, m.fused_gate, m.refusal) for m in parts["mlps"]).items():
        table.add_row(str(number), str(width), "yes" if fused else "no", why)
    console.print(table)
    table = Table("method", "takes", "leaves", "because")
    for name, verdict in parts["methods"].items():
        reasons = Counter(verdict["refused"].values())
        why = "; ".join(reason for reason, _ in reasons.most_common(2))
        table.add_row(name, str(verdict["takes"]), str(len(verdict["refused"])), why)
    console.print(table)


def print_methods(console: Console) -> None:
    """All methods with the first line of their cards."""
    table = Table("method", "what it does", "data")
    for name in names():
        method = find(name)(**find(name).example)
        table.add_row(name, card(name).splitlines()[0], looks_at_data(method))
    console.print(table)


def looks_at_data(method: Transform) -> str:
    """Whether a method with these options wants calibration data."""
    return "yes" if method.needs_data else "where given" if method.uses_data else "no"


def print_card(name: str, console: Console) -> None:
    """A method's card and its options."""
    method = find(name)
    console.print(Text(name, style="bold"))
    console.print(Text(card(name) + "\n"))
    table = Table("option", "type", "default", "what it is")
    for option, facts in method.model_json_schema(by_alias=True)["properties"].items():
        default = facts.get("default", "required")
        table.add_row(option, kind(facts), str(default), facts.get("description", ""))
    console.print(table)


def kind(facts: dict[str, Any]) -> str:
    """The type and range of an option in words."""
    if "anyOf" in facts:
        return " or ".join(kind(choice) for choice in facts["anyOf"])
    if "enum" in facts:
        return " | ".join(map(str, facts["enum"]))
    bounds = {"exclusiveMinimum": "> ", "minimum": ">= ", "exclusiveMaximum": "< ", "maximum": "<= "}
    words = [sign + f"{facts[key]:g}" for key, sign in bounds.items() if key in facts]
    return " ".join([facts.get("type", "any"), *words])
