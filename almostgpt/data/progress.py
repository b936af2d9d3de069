"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY = 30  # seconds between plain lines


def say(line: str, show: bool = True) -> None:
    """One plain line on stderr."""
    if show:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(title: str, total: int, show: bool = True) -> Iterator[Callable[[int], object]]:
    """A bar that the yielded ``advance(amount)`` moves; nothing unless stderr is a terminal."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield lambda amount: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)


@contextmanager
def throughput(
    title: str, total: int | None, unit: str, show: bool = True
) -> Iterator[Callable[[int, int], object]]:
    """How far a stream has come, how fast it goes and how long it will take.

    Args:
        total: bytes of the source, None where they are not known.
        unit: what is made of them, such as ``tokens``.

    Yields ``advance(bytes, amount)``. A bar on a terminal, a line every half a minute elsewhere.
    """
    console = Console(stderr=True)
    if not show:
        yield lambda size, amount: None
    elif console.is_terminal:
        columns = ["{task.description}", BarColumn(), TaskProgressColumn(), "{task.fields[pace]}"]
        columns = [TextColumn(c) if isinstance(c, str) else c for c in columns]
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task, rate = bar.add_task(title, total=total, pace=""), _Rate(unit)
            yield lambda size, amount: bar.update(task, advance=size, pace=rate.after(size, amount))
    else:
        yield _Lines(title, total, _Rate(unit))


class _Rate:
    """Amounts over the time since the first."""

    def __init__(self, unit: str):
        self.unit, self.size, self.amount, self.start = unit, 0, 0, time.monotonic()

    def after(self, size: int, amount: int) -> str:
        self.size += size
        self.amount += amount
        a_second = self.amount / max(time.monotonic() - self.start, 1e-9)
        return f"{self.amount:,} {self.unit}, {a_second / 1e6:.2f} M/s"

    def seconds_left(self, total: int) -> float:
        """At this rate, until ``total`` bytes are read."""
        return (total - self.size) * (time.monotonic() - self.start) / max(self.size, 1)


class _Lines:
    """A plain line now and then."""

    def __init__(self, title: str, total: int | None, rate: _Rate):
        self.title, self.total, self.rate, self.last = title, total, rate, time.monotonic()

    def __call__(self, size: int, amount: int) -> None:
        line = f"{self.title}: {self.rate.after(size, amount)}"
        if time.monotonic() - self.last < LINE_EVERY:
            return
        self.last = time.monotonic()
        if self.total:
            minutes = self.rate.seconds_left(self.total) / 60
            line += f", {self.rate.size / self.total:.1%}, {minutes:.0f} min left"
        say(line)
