"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


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
