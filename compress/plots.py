"""Plots as inline SVG: rows of horizontal bars, which carry long module names and any number of layers."""

from __future__ import annotations

import math
from html import escape

LABEL, BAR, VALUE, ROW = 300, 420, 150, 22  # widths of the three columns and the height of a row
LETTERS = 40  # how many fit into LABEL


def bars(title: str, rows: list[tuple[str, float, float, str]]) -> str:
    """A row each of label, value before, value after and text: solid is what stayed, pale what went, red what grew."""
    numbers = [value for row in rows for value in row[1:3] if math.isfinite(value)]
    low, high = min([0.0, *numbers]), max([0.0, *numbers])
    scale = BAR / ((high - low) or 1)
    lines = [_row(index * ROW, row, low, scale) for index, row in enumerate(rows)]
    width, height = LABEL + BAR + VALUE, len(rows) * ROW
    zero = LABEL - low * scale
    axis = f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{height}"/>'
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="plot"><svg viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}" role="img" aria-label="{escape(title)}">{"".join(lines)}{axis}</svg>'
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
