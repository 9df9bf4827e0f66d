"""How far the survey is: a bar with rate and time left on a terminal, elsewhere a line now and then. On stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show progress towards `total` bytes; yields the function that adds bytes to what is done."""
    console = Console(file=sys.stderr, highlight=False)
    if not console.is_terminal:
        yield _Lines(total).add
        return
    columns = (TextColumn("measuring"), BarColumn(bar_width=None), TaskProgressColumn(), TransferSpeedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


class _Lines:
    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._started = self._latest = time.monotonic()

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._latest < SECONDS_BETWEEN_LINES:
            return
        self._latest = now
        rate = self._done / (now - self._started)
        left = (self._total - self._done) / rate
        share = self._done / self._total
        print(f"measured {share:.0%}, {rate / 1e6:.0f} MB/s, {left:.0f} s left", file=sys.stderr, flush=True)
