"""Progress bars with an ETA on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items; on a terminal with a bar, the share done and the time left."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, total=total, description=label)


class Tracked(list):
    """Batches that show a bar whenever something goes through them."""

    def __init__(self, items: Iterable, label: str):
        super().__init__(items)
        self.label = label

    def __iter__(self) -> Iterator:
        return track(super().__iter__(), self.label, len(self))


def say(line: str) -> None:
    """One line of what is going on, on the terminal only."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr)
