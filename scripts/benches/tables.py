"""The tables of results in recipes/; a run replaces the rows that it measured."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from benches.paired import Missing

ROOT = Path(__file__).resolve().parents[2]


def update(table: Path, head: list[str], rows: list[list[str]], keys: int, gone: tuple[str, ...] = ()) -> None:
    """Put rows into a table in place of those with the same first `keys` cells, and take out those that begin so."""
    found = {}
    if table.exists():
        with table.open(newline="") as file:
            found = {tuple(row[:keys]): row for row in list(csv.reader(file))[1:]}
    found = {key: row for key, row in found.items() if key[0] not in gone} | {tuple(row[:keys]): row for row in rows}
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *found.values()])


def show(head: list[str], rows: list[list[str]]) -> None:
    """Print rows in columns."""
    widths = [max(len(str(row[at])) for row in [head, *rows]) for at in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def fill(table: Path, head: list[str], jobs: dict[str, Callable[[], Iterator[list[list[str]]]]]) -> int:
    """Put the rows of every job into a table as they come; the number of jobs that lacked something."""
    missed = 0
    for name, job in jobs.items():
        try:
            for rows in job():
                update(table, head, rows, keys=4)
                show(head, rows)
        except Missing as reason:
            print(f"skipped: {name}: {reason}")
            missed += 1
    return missed
