"""How a run tells a person where it is: a live line on a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


def describe(metrics: dict[str, Any]) -> str:
    """``loss 2.31 · val 2.40 · lr 1.0e-03 · grad 0.91 · 45.2k tok/s · MFU 41% · 1.2 GB``"""
    parts = [f"loss {metrics['loss']:.4f}"]
    if metrics.get("val_loss") is not None:
        parts.append(f"val {metrics['val_loss']:.4f}")
    parts += [
        f"lr {metrics['lr']:.2e}",
        f"grad {metrics['grad_norm']:.3f}",
        f"{_short(metrics['tokens_per_second'])} tok/s",
    ]
    if metrics.get("mfu") is not None:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    parts.append(f"{metrics['memory'] / 1e9:.2f} GB")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """``1:02:03``"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _short(number: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


class PlainProgress:
    """A line at each log point."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def note(self, text: str) -> None:
        """Prints a message of its own."""
        print(text, file=self.stream, flush=True)

    def step(self, step: int, steps: int, metrics: dict[str, Any], seconds_left: float) -> None:
        """Called at log points with the newest metrics."""
        self.note(f"step {step}/{steps} · {describe(metrics)} · {duration(seconds_left)} left")


class LiveProgress(PlainProgress):
    """A progress bar and the newest metrics, redrawn in place."""

    def __init__(self, console: Console):
        self.console = console
        self.live = Live(Text("starting …"), console=console, refresh_per_second=4)

    def __enter__(self) -> LiveProgress:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def step(self, step: int, steps: int, metrics: dict[str, Any], seconds_left: float) -> None:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"step {step}/{steps}", style="bold"),
            ProgressBar(total=steps, completed=step, width=30),
            Text(f"{duration(seconds_left)} left", style="cyan"),
        )
        self.live.update(Group(bar, Text(describe(metrics))))


def make_progress(stream: TextIO | None = None) -> PlainProgress:
    """The live one where ``stream`` (stderr by default) is a terminal."""
    stream = sys.stderr if stream is None else stream
    console = Console(file=stream)
    return (
        LiveProgress(console)
        if console.is_terminal and not console.is_dumb_terminal
        else PlainProgress(stream)
    )
