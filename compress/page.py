"""The report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import re
from collections import defaultdict
from html import escape

from compress.measure import human
from compress.plots import bars, cells, curve, mosaic
from compress.report import LEDGER, MEASURES, Report

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6778; --paper: #f6f7f9; --card: #fff; --line: #dfe3ea;
  --main: #2f6fde; --pale: #c9daf8; --bad: #c93a3a; --good: #1f8a55 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa5b8; --paper: #12151b; --card: #1a1f28;
  --line: #2d3441; --main: #6ea0f5; --pale: #2b4268; --bad: #f07070; --good: #54c48a } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  padding: 2rem 1.5rem; max-width: 62rem }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
p { margin: .4rem 0; overflow-wrap: anywhere } .soft, figcaption, th { color: var(--soft) }
b, td { font-variant-numeric: tabular-nums }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .8rem; margin: 1.2rem 0 }
.tile, figure, .grid { background: var(--card); border: 1px solid var(--line); border-radius: 8px }
.tile { padding: .8rem 1rem } .tile b { display: block; font-size: 1.1rem }
.grid { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .45rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top }
td:not(:nth-child(4)) { white-space: nowrap } tr:last-child td { border-bottom: 0 }
th { font-weight: 600; font-size: .85rem } .missed { color: var(--bad); font-weight: 700 }
.fine { color: var(--good); font-weight: 700 }
figure { margin: .8rem 0; padding: .8rem } figcaption { margin-bottom: .5rem; overflow-wrap: anywhere }
.plot { max-height: 44rem; overflow: auto } svg { display: block; max-width: none }
svg text { font: 12px ui-monospace, monospace; fill: var(--ink) } svg .label { text-anchor: end; fill: var(--soft) }
svg .cell { text-anchor: middle } .line { fill: none; stroke: var(--main); stroke-width: 2 }
.stayed { fill: var(--main) } .went { fill: var(--pale) } .grew { fill: var(--bad) } .axis { stroke: var(--soft) }
"""


def page(report: Report) -> str:
    """The whole page."""
    parts = [
        f"<h1>{escape(report.model)}</h1>",
        f'<p class="soft">compressed by {escape(report.recipe)} in {human(report.seconds, "s")}, '
        f"{escape(report.created)}</p>",
        _tiles(report),
        f"<p>Reload check: {_colour(report.verdict(), bool(report.verified.get('passed')))}</p>",
        f"<p>Format <b>{escape(report.format)}</b>: {escape(report.why_format)}</p>",
        "<h2>Before and after</h2>",
        _table(MEASURES, report.measure_rows()),
        *[f'<p class="soft">{escape(line)}</p>' for line in report.remarks()],
        "<h2>What each step did</h2>",
        _table(LEDGER, report.step_rows()),
        *_waterfall(report),
        *[plot for step in report.steps if "allocation" in step["notes"] for plot in _allocation(step)],
        *[_rounds(step) for step in report.steps if "curves" in step["notes"]],
        *[_merged(step, *sample) for step in report.steps for sample in enumerate(step["notes"].get("pictures", []))],
        "<h2>Layers</h2>" if report.layers or _scores(report) else "",
        *_layers(report),
        *[bars(title, [(path, value, value, human(value)) for path, value in rows]) for title, rows in _scores(report)],
        "<h2>Where this was measured</h2>",
        _table(("what", "which"), [*report.hardware.items(), *report.versions.items()]),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.model)}, compressed</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _tiles(report: Report) -> str:
    """The three figures that everybody asks for first, as far as they were measured."""
    tiles = []
    for name in ("size", "parameters", "latency"):
        if measure := report.measure(name):
            tiles.append(
                f'<div class="tile"><span class="soft">{name}</span>'
                f"<b>{human(measure.before, measure.unit)} → {human(measure.after, measure.unit)}</b>"
                f'<span class="soft">{escape(measure.change())}</span></div>'
            )
    limits = [measure.passed for measure in report.measures if measure.passed is not None]
    if limits:
        told = _colour(f"{sum(limits)} of {len(limits)}", all(limits))
        tiles.append(f'<div class="tile"><span class="soft">limits kept</span><b>{told}</b></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _waterfall(report: Report) -> list[str]:
    """The bytes and the error from the original through the steps."""
    size = report.measure("size")
    known = [step for step in report.steps if step["bytes"] is not None]
    start = sum(before for before, _ in report.layers.values())  # as it was loaded: a cast is no step's merit
    last = start or (size.before if size and size.before is not None else known[0]["bytes"] if known else 0)
    rows = [("original", last, last, human(last, "bytes"))] if known else []
    for step in known:
        rows.append((step["use"], last, step["bytes"], human(step["bytes"], "bytes")))
        last = step["bytes"]
    told = [(step["use"], step["error"]) for step in report.steps if step["error"] is not None]
    errors = [(use, error, error, human(error)) for use, error in told]
    plots = [("Size after each step", rows), ("Error against the original after each step", errors)]
    return [bars(title, drawn) for title, drawn in plots if drawn]


def _allocation(step: dict) -> list[str]:
    """What each layer got, by its place in the stack and its role there, and what other budgets would have cost."""
    told = step["notes"]["allocation"]
    grid, most = defaultdict(dict), max(told["bits"].values())
    for path, bits in told["bits"].items():
        number = re.search(r"(?<=\.)\d+(?=\.)|^\d+", path)
        role = path if number is None else f"{path[: number.start()]}*{path[number.end() :]}"
        name = told["choices"][path]
        hint = f"{path}: {name}, {bits:.3g} bits a weight with its scales"
        grid[role][int(number[0]) if number else 0] = (name.removeprefix("w").partition("g")[0][:3], bits / most, hint)
    shown = "predicted" if told["by"] == "lrp" else "measured"  # relevance foretells an order, no loss
    marks = {name: (point["weight"], point[shown]) for name, point in told["points"].items()}
    title = f"{step['use']}: predicted loss (by {told['by']}) of the best allocation for each budget"
    dots = f"; dots: measured on {told['data']}" if shown == "measured" else ""
    return [
        cells(f"{step['use']}: bits of every layer, {told['average']:.3g} a weight on average", dict(grid)),
        curve(title + dots, told["curve"], marks, told["unit"]),
    ]


def _rounds(step: dict) -> str:
    """What pruning cost round by round with the score that was taken, and in the end with the others."""
    told = step["notes"]["curves"]
    marks = {name: tuple(rounds[-1]) for name, rounds in told.items()}
    title = (
        f"{step['use']}: loss on held-out data for the share that stays; line: the rounds by {step['notes']['taken']}"
    )
    return curve(title, [tuple(point) for point in told[step["notes"]["taken"]]], marks, "share")


def _merged(step: dict, number: int, sample: dict) -> str:
    """A sample image, and what is one token after each block."""
    title = f"{step['use']}: image {number + 1}, and the tokens that are left after each block"
    return mosaic(title, sample["width"], sample["colours"], sample["groups"])


def _layers(report: Report) -> list[str]:
    rows = [
        (path, before, after, f"{human(before, 'bytes')} → {human(after, 'bytes')}")
        for path, (before, after) in report.layers.items()
    ]
    return [bars("Size by layer, before and after", rows)] if rows else []


def _scores(report: Report) -> list[tuple[str, list[tuple[str, float]]]]:
    """Every note of a step that gives a number to each path."""

    def numeric(note):
        return isinstance(note, dict) and note and all(type(value) in (int, float) for value in note.values())

    return [
        (f"{step['use']}: {key}", list(note.items()))
        for step in report.steps
        for key, note in step["notes"].items()
        if numeric(note)
    ]


def _colour(text: str, fine: bool) -> str:
    return f'<span class="{"fine" if fine else "missed"}">{escape(text)}</span>'


def _table(columns, rows) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    marks = {"MISSED": ' class="missed"', "yes": ' class="fine"'}
    body = "".join(
        "<tr>" + "".join(f"<td{marks.get(str(cell), '')}>{escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="grid"><table><tr>{head}</tr>{body}</table></div>' if rows else ""
