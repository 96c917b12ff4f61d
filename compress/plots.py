"""Plots as inline SVG: rows of bars or cells, which carry long module names and any number of layers, and curves."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from html import escape
from itertools import groupby

from compress.measure import human

LABEL, BAR, VALUE, ROW = 300, 420, 150, 22  # widths of the three columns and the height of a row
LETTERS = 40  # how many fit into LABEL
CELL = 28  # width of a cell
TILE, GAP = 96, 8  # side of a picture and the space behind it
HEIGHT, DOT = 260, 4  # of a curve and of its marks


def bars(title: str, rows: list[tuple[str, float, float, str]]) -> str:
    """A row each of label, value before, value after and text: solid is what stayed, pale what went, red what grew."""
    numbers = [value for row in rows for value in row[1:3] if math.isfinite(value)]
    low, high = min([0.0, *numbers]), max([0.0, *numbers])
    scale = BAR / ((high - low) or 1)
    lines = [_row(index * ROW, row, low, scale) for index, row in enumerate(rows)]
    zero = LABEL - low * scale
    axis = f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{len(rows) * ROW}"/>'
    return _figure(title, "".join(lines) + axis, LABEL + BAR + VALUE, len(rows) * ROW)


def cells(title: str, rows: dict[str, dict[int, tuple[str, float, str]]]) -> str:
    """A grid: of every row the cells by column, with their text, shade from 0 to 1 and what hovering tells."""
    columns = 1 + max(column for row in rows.values() for column in row)
    drawn = []
    for index, (label, row) in enumerate(rows.items()):
        top = index * ROW
        drawn.append(f'<text class="label" x="{LABEL - 8}" y="{top + 15}">{escape(_short(label))}</text>')
        for column, cell in row.items():
            text, shade, told = cell
            left = LABEL + column * CELL
            drawn.append(
                f'<g><title>{escape(told)}</title><rect class="stayed" x="{left}" y="{top + 1}" width="{CELL - 2}"'
                f' height="{ROW - 2}" fill-opacity="{0.08 + 0.82 * shade:.2f}"/>'
                f'<text class="cell" x="{left + CELL / 2 - 1:g}" y="{top + 15}">{escape(text)}</text></g>'
            )
    return _figure(title, "".join(drawn), LABEL + columns * CELL, len(rows) * ROW)


def mosaic(title: str, width: int, colours: list[str], groups: dict[str, list[int]]) -> str:
    """An image as its patches, and after each block with what was merged by then in one colour."""
    side, drawn = TILE / width, []
    rows = -(-len(colours) // width)
    tiles = {"image": list(range(len(colours))), **groups}
    for index, (name, places) in enumerate(tiles.items()):
        left, members = index * (TILE + GAP), defaultdict(list)
        for patch, place in enumerate(places):
            members[place].append(patch)
        shade = {place: blend([colours[patch] for patch in own]) for place, own in members.items()}
        told = f"{name}: {len(colours)} patches in {len(members)} tokens"
        drawn.append(f"<g><title>{escape(told)}</title>")
        for row in range(rows):
            start = row * width
            for colour, run in groupby(range(start, start + width), key=lambda patch: shade[places[patch]]):  # noqa: B023
                own = list(run)
                x, y, long = left + (own[0] - start) * side, row * side, len(own) * side
                drawn.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{long:.1f}" height="{side:.1f}" fill="#{colour}"/>')
        number = re.findall(r"\d+", name)
        label = f"{number[-1] if number else name}: {len(members)}"
        drawn.append(f'<text class="cell" x="{left + TILE / 2}" y="{rows * side + 15:.0f}">{escape(label)}</text></g>')
    return _figure(title, "".join(drawn), len(tiles) * (TILE + GAP), rows * side + ROW)


def blend(colours: list[str]) -> str:
    """The mean of hexadecimal colours."""
    parts = [[int(colour[at : at + 2], 16) for colour in colours] for at in (0, 2, 4)]
    return "".join(f"{round(sum(part) / len(part)):02x}" for part in parts)


def curve(title: str, line: list[tuple[float, float]], marks: dict[str, tuple[float, float]], unit: str) -> str:
    """A falling line over logarithmic heights, with marks on and beside it that are told apart by their texts."""
    points = [*line, *marks.values()]
    heights = [y for _, y in points if 0 < y < math.inf]
    if len(points) < 2 or not heights:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = math.log(min(heights)), math.log(max(heights))

    def place(point: tuple[float, float]) -> str:
        x = DOT + (point[0] - left) / ((right - left) or 1) * (LABEL + BAR - 2 * DOT)
        level = math.log(min(max(point[1], math.exp(low)), math.exp(high)))
        return f"{x:.1f},{DOT + (high - level) / ((high - low) or 1) * (HEIGHT - 2 * DOT):.1f}"

    drawn, free = [f'<polyline class="line" points="{" ".join(map(place, line))}"/>'], 0.0
    for name, point in sorted(marks.items(), key=lambda mark: -mark[1][1]):
        x, y = map(float, place(point).split(","))
        free = max(free, y) + ROW  # texts of neighbours stand below each other
        side, at = ("label", x - 2 * DOT) if x > (LABEL + BAR) / 2 else ("", x + 2 * DOT)
        told = f"{name}: {human(point[0], unit)}, {human(point[1])}"
        drawn.append(f'<circle class="grew" cx="{x}" cy="{y}" r="{DOT}"/>')
        drawn.append(f'<text class="{side}" x="{at:g}" y="{free - ROW + DOT:g}">{escape(told)}</text>')
    return _figure(title, "".join(drawn), LABEL + BAR, HEIGHT + ROW * len(marks))


def _figure(title: str, drawn: str, width: int, height: int) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="plot"><svg viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}" role="img" aria-label="{escape(title)}">{drawn}</svg>'
        "</div></figure>"
    )


def _row(top: float, row: tuple[str, float, float, str], low: float, scale: float) -> str:
    label, before, after, text = row

    def bar(kind, start, end):
        if not (math.isfinite(start) and math.isfinite(end)) or start == end:
            return ""
        left, width = LABEL + (min(start, end) - low) * scale, abs(end - start) * scale
        return f'<rect class="{kind}" x="{left:.1f}" y="{top + 4}" width="{width:.1f}" height="{ROW - 8}" rx="2"/>'

    grown = after > before >= 0
    end = LABEL + (max(value for value in (before, after, 0.0) if math.isfinite(value)) - low) * scale
    return (
        f"<g><title>{escape(label)}: {escape(text)}</title>"
        f'<text class="label" x="{LABEL - 8}" y="{top + 15}">{escape(_short(label))}</text>'
        + bar("stayed", 0, before if grown else after)
        + (bar("grew", before, after) if grown else bar("went", after, before))
        + f'<text x="{end + 8:.1f}" y="{top + 15}">{escape(text)}</text></g>'
    )


def _short(label: str) -> str:
    """The end of a long module name tells the modules apart."""
    return label if len(label) <= LETTERS else "…" + label[1 - LETTERS :]
