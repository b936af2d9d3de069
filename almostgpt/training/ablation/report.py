"""What an ablation found: a table, the same as JSON and Markdown, and a picture."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from almostgpt.files import write_text
from almostgpt.training.ablation.runs import Outcome
from almostgpt.training.ablation.statistics import Estimate, estimate
from almostgpt.training.ablation.variants import Variant

COLUMNS = (
    *("variant", "parameters", "validation loss", "difference to the first"),
    *("tokens/s", "seconds a run", "remarks"),
)


@dataclass(frozen=True)
class Row:
    """A variant over its seeds. Runs that did not finish are in none of the means."""

    name: str
    settings: dict[str, Any]
    parameters: int
    mlp_hidden: int
    runs: list[Outcome]
    val_loss: Estimate | None
    difference: Estimate | None  # to the first variant, seed by seed; None for the first itself
    tokens_per_second: float | None
    seconds: float | None  # of training, a run

    @property
    def remarks(self) -> str:
        """What did not finish."""
        counts = {s: sum(run.status == s for run in self.runs) for s in ("diverged", "failed")}
        return ", ".join(
            f"{count} of {len(self.runs)} {status}" for status, count in counts.items() if count
        )


def make_rows(variants: Sequence[Variant], outcomes: Sequence[Sequence[Outcome]]) -> list[Row]:
    """``outcomes[i]``: those of ``variants[i]``, as many as there are yet."""
    losses = [
        {run.seed: run.val_loss for run in runs if run.status == "finished"} for runs in outcomes
    ]
    rows = []
    for variant, runs, own in zip(variants, outcomes, losses, strict=True):
        done = [run for run in runs if run.status == "finished"]
        both = [seed for seed in own if seed in losses[0]]
        differences = [own[seed] - losses[0][seed] for seed in both]
        rows.append(
            Row(
                name=variant.name,
                settings=dict(variant.settings),
                parameters=variant.parameters,
                mlp_hidden=variant.config.model.mlp_hidden,
                runs=list(runs),
                val_loss=estimate(list(own.values())),
                difference=None if variant is variants[0] else estimate(differences),
                tokens_per_second=_mean([run.tokens_per_second for run in done]),
                seconds=_mean([run.seconds for run in done]),
            )
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    values = [value for value in values if value is not None]
    return math.fsum(values) / len(values) if values else None


# ---------------------------------------------------------------- for people


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table, a text for each of ``COLUMNS``."""
    return [
        [
            row.name,
            f"{row.parameters:,}",
            _with_interval(row.val_loss, "")
            + ("" if row.val_loss is None else f" (n = {row.val_loss.n})"),
            _with_interval(row.difference, "+"),
            "–" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "–" if row.seconds is None else f"{row.seconds:,.1f}",
            row.remarks,
        ]
        for row in rows
    ]


def _with_interval(value: Estimate | None, sign: str) -> str:
    if value is None:
        return "–"
    interval = "" if value.half_width is None else f" ± {value.half_width:.4f}"
    return f"{value.mean:{sign}.4f}{interval}"


def markdown_table(rows: Sequence[Row]) -> str:
    """GitHub's form; numbers stand on the right."""
    lines = [COLUMNS, ["---", *["---:"] * 5, "---"], *cells(rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_machine(device: torch.device) -> str:
    """What it was measured on: the GPU or the processor, and torch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        text = cpuinfo.read_text() if cpuinfo.exists() else ""
        named = re.search(r"model name\s*:\s*(.+)", text)
        processor = named[1].strip() if named else platform.processor() or platform.machine()
        name = f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


# ---------------------------------------------------------------- files


def write_report(out: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """``results.json``, ``results.md`` and ``ablation.png``.

    Args:
        about: what was done, JSON values: ``command``, ``date``, ``machine``, ``seeds``, ``tokens``,
            ``match`` and whatever else.
    """
    values = {**about, "variants": [asdict(row) for row in rows]}
    write_text(out / "results.json", json.dumps(values, indent=1, allow_nan=False) + "\n")
    matched = "matched parameters" if about["match"] == "parameters" else "parameters as they come"
    text = (
        f"```bash\n{about['command']}\n```\n\n{markdown_table(rows)}\n\n"
        f"Means over the seeds {', '.join(map(str, about['seeds']))}, ± half a 95 % interval by Student's t; "
        f"differences are taken seed by seed. {about['tokens']:,} tokens each, {matched}. "
        f"{about['machine']}, {about['date']}.\n"
    )
    write_text(out / "results.md", text)
    plot(rows, out / "ablation.png")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Mean validation losses with their intervals, and the runs they are made of, as a PNG."""
    from matplotlib.figure import Figure  # half a second to import, needed at the end alone

    figure = Figure(figsize=(8, 1.5 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        single = [run.val_loss for run in row.runs if run.status == "finished"]
        axes.plot(single, [place] * len(single), "o", color="tab:gray", alpha=0.5, markersize=4)
        if row.val_loss is not None:
            mean, half = row.val_loss.mean, row.val_loss.half_width
            axes.errorbar(mean, place, xerr=half, fmt="D", color="tab:blue", capsize=4)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()  # the first on top, as in the table
    axes.set(
        xlabel="validation loss (nats per token): runs, their mean and its 95 % interval",
        ylim=(len(rows) - 0.5, -0.5),
    )
    axes.grid(alpha=0.3, axis="x")
    temporary = path.with_name(f".{path.name}.writing")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)
