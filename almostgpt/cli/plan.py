"""``almostgpt info --plan``: what training a configuration would take on this machine."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console
from rich.table import Table

from almostgpt.cli.arguments import Settings, parse
from almostgpt.cli.settings import DEFAULT_PRESET, Beginning
from almostgpt.config import Config
from almostgpt.device import pick_device
from almostgpt.training.plan import Plan, make_plan
from almostgpt.training.progress import duration

DESCRIPTION = """Predicts what training a configuration takes on this machine, without its data: parameters,
FLOPs, the memory of a step, the largest micro-batch that fits, the time of a step and of the run.
Every setting of almostgpt train can be given. It measures for a few seconds.

examples:
  almostgpt info --plan --config gpt2-124m
  almostgpt info --plan --config gpt2-124m --model.n-layer 24 --model.gradient-checkpointing full
  almostgpt info --plan --config my.yaml --device cuda --json"""


@dataclass(frozen=True)
class PlanArguments:
    settings: Settings
    config: str = DEFAULT_PRESET  # a built-in preset, or a YAML file
    json: bool = False  # one JSON object on stdout instead of the tables


def run_plan(arguments: list[str]) -> int:
    """The command, with the arguments that follow ``info``, but for ``--plan``."""
    begin = Beginning.of(arguments)
    given = parse(
        PlanArguments,
        arguments,
        prog="almostgpt info --plan",
        description=DESCRIPTION,
        default=PlanArguments(settings=begin.defaults, config=begin.preset),
    )
    config = begin.complete(given.settings)
    plan = make_plan(config, pick_device(config.device))
    if given.json:
        print(json.dumps({"config": given.config, **dataclasses.asdict(plan)}))
    else:
        _show(plan, config, given.config)
    return 0


def _show(plan: Plan, config: Config, name: str) -> None:
    console = Console(file=sys.stdout, highlight=False)
    training, fit, expected = config.training, plan.fit, plan.duration
    chosen = plan.checkpointing[config.model.gradient_checkpointing]
    batch = f"{training.batch_size} x {training.accumulate} rows of {config.model.block_size}"
    run_flops = plan.flops_per_token * plan.tokens
    rows = {
        "parameters": f"{plan.parameters:,}, with a vocabulary of {plan.vocab_size:,}",
        "tokens": f"{plan.tokens_per_step:,} a step ({batch}), {plan.tokens:,} in all",
        "FLOPs": f"{plan.flops_per_token:.3g} a token, {run_flops:.3g} in all",
    }
    _show_rows(console, f"{name} on {plan.device}, {training.precision}", rows)

    rows = {
        "weights": _size(chosen.weights),
        "gradients": _size(chosen.gradients),
        "optimizer": _size(chosen.optimizer),
        "logits and loss": _size(chosen.logits_and_loss),
    }
    _show_rows(console, f"memory of a step with micro-batches of {training.batch_size}", rows)
    table = Table(box=None, padding=(0, 2))
    table.add_column("gradient checkpointing")
    table.add_column("activations", justify="right")
    table.add_column("most of all at a time", justify="right")
    for kind, needs in plan.checkpointing.items():
        mark = " (chosen)" if needs is chosen else ""
        table.add_row(kind + mark, _size(needs.activations), _size(needs.peak))
    console.print(table)

    left = 1 - fit.usable_bytes / fit.free_bytes
    rows = {
        "free memory": f"{_size(fit.free_bytes)}, of which {left:.0%} are left alone",
        "largest micro-batch": f"{fit.largest_micro_batch:,} rows",
    }
    if expected is not None:
        ends = f"{datetime.fromisoformat(expected.ends):%Y-%m-%d %H:%M}"
        rows |= {
            "a step": f"{expected.step:.3g} s, {expected.tokens_per_second:,.0f} tokens/s",
            "training": duration(expected.training),
            "validation": duration(expected.evaluation),
            "the run": f"{duration(expected.run)}: begun now, it ends at {ends}",
            "measured with": expected.measured,
        }
    _show_rows(console, "on this device", rows)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _show_rows(console: Console, title: str, rows: dict[str, str]) -> None:
    console.print(title, style="bold", markup=False, soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2))
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table)


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
