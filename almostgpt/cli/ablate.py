"""``almostgpt ablate``: the same run with one part or another, over several seeds."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from almostgpt.cli.arguments import Settings, parse
from almostgpt.cli.settings import DEFAULT_PRESET, Beginning
from almostgpt.config import MAX_SEED, Config, overlay
from almostgpt.data.prepare import cached_dataset
from almostgpt.device import pick_device
from almostgpt.errors import UserError
from almostgpt.files import expand
from almostgpt.training.ablation.report import (
    COLUMNS,
    Row,
    cells,
    describe_machine,
    make_rows,
    markdown_table,
    write_report,
)
from almostgpt.training.ablation.runs import Outcome, Stopped, check_same_ablation, run_one
from almostgpt.training.ablation.variants import (
    MOST_SEEDS,
    Variant,
    make_variants,
    parse_varied,
)
from almostgpt.training.progress import LiveProgress, PlainProgress, make_progress
from almostgpt.training.run import with_vocabulary

DESCRIPTION = """Trains every combination of the varied settings with several seeds, on the same tokens and
with as many parameters each (the width of the feed-forward is adapted), and compares validation
losses: means, 95 % intervals, and differences to the first combination, seed by seed. Every setting
of almostgpt train can be given. Into --out go the runs, results.json, results.md and ablation.png.
The same command again goes on where it was stopped. The last line on stdout is a JSON object.

examples:
  almostgpt ablate --vary model.norm=rmsnorm,layernorm
  almostgpt ablate --config shakespeare-char-cpu --vary model.norm=rmsnorm,layernorm \\
      --vary model.feedforward=gelu,swiglu --seeds 3 --out runs/parts        four variants, 12 runs
  almostgpt ablate --vary model.position=rope,alibi,none --training.steps 300 --out runs/positions
  almostgpt ablate --vary model.n-kv-head=4,2,1 --match none --out runs/heads   as wide as they are
  almostgpt ablate --vary optimizer.lr=1e-3,3e-3 --seeds 5 --out runs/rates"""


@dataclass(frozen=True)
class AblateArguments:
    settings: Settings
    out: Path | None = None  # for runs and results; default runs/ablation-<what is varied>
    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # KEY=VALUE,VALUE; repeatable
    seeds: int = 3  # runs of each variant, with the seeds seed, seed + 1, …
    match: str = "parameters"  # parameters | none: adapt the width of the feed-forward, or do not
    config: str = DEFAULT_PRESET  # a built-in preset, or a YAML file


def run(arguments: list[str]) -> int:
    begin = Beginning.of(arguments)
    given = parse(
        AblateArguments,
        arguments,
        prog="almostgpt ablate",
        description=DESCRIPTION,
        default=AblateArguments(settings=begin.defaults, config=begin.preset),
    )
    if not given.vary:
        raise UserError("say what to vary: --vary model.norm=rmsnorm,layernorm")
    if not 1 <= given.seeds <= min(MOST_SEEDS, MAX_SEED + 1 - given.settings.seed):
        raise UserError(f"--seeds is {given.seeds}, but must be in 1 … {MOST_SEEDS}")
    varied = parse_varied(given.vary)
    # Once with a vocabulary that is made up: what cannot be is said before the text is read.
    assumed = make_variants(given.settings, varied, lambda c: _assumed(begin.complete(c)), "none")
    shared = assumed[0].config
    device = pick_device(shared.device)
    dataset = cached_dataset(shared.data, tokenizer=begin.initial and begin.initial.tokenizer)
    variants = make_variants(
        given.settings,
        varied,
        lambda config: with_vocabulary(begin.complete(config), dataset),
        given.match,
    )
    seeds = [shared.seed + i for i in range(given.seeds)]
    out = expand(given.out) if given.out is not None else _default_out(varied)
    check_same_ablation(out, variants, seeds)
    _say_what_comes(variants, seeds)

    outcomes: list[list[Outcome]] = [[] for _ in variants]
    stopped = None
    try:
        for seed in seeds:  # not variant by variant: what is stopped has compared all of them
            for variant, ended in zip(variants, outcomes, strict=True):
                number = sum(map(len, outcomes)) + 1
                outcome = run_one(out, variant, seed, dataset, device, _progress)
                ended.append(outcome)
                _say(f"{number}/{len(variants) * len(seeds)} {variant.name}, {_describe(outcome)}")
    except Stopped as signal:
        stopped = str(signal)
        _say(f"stopped by {stopped}; the same command goes on from here")
    rows = make_rows(variants, outcomes)
    training = shared.training
    about = {
        "command": shlex.join(["almostgpt", "ablate", *arguments]),
        "date": date.today().isoformat(),
        "machine": describe_machine(device),
        "match": given.match,
        "seeds": seeds,
        "steps": training.steps,
        "tokens": training.steps
        * training.batch_size
        * training.accumulate
        * shared.model.block_size,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_report(out, rows, about)
    _show(rows)
    print(json.dumps(_result(out, rows, stopped)))
    return 0


def _default_out(varied: Iterable[str]) -> Path:
    """``runs/ablation-norm-feedforward``: the same for the same question, so that it goes on."""
    return Path("runs") / "-".join(["ablation", *(key.rpartition(".")[2] for key in varied)])


def _assumed(config: Config) -> Config:
    """With a vocabulary, whatever it is."""
    return overlay(config, {"model.vocab_size": config.model.vocab_size or 1})


def _say_what_comes(variants: list[Variant], seeds: list[int]) -> None:
    first = variants[0].parameters
    _say(f"{len(variants)} variants, seeds {', '.join(map(str, seeds))}")
    for variant in variants:
        more = f" ({variant.parameters / first - 1:+.2%})" if variant.parameters != first else ""
        hidden = variant.config.model.mlp_hidden
        _say(f"  {variant.name}: {variant.parameters:,} parameters{more}, mlp_hidden {hidden}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _describe(outcome: Outcome) -> str:
    if outcome.status != "finished":
        return f"seed {outcome.seed}: {outcome.status}: {outcome.problem}"
    return f"seed {outcome.seed}: validation loss {outcome.val_loss:.4f}, {outcome.seconds:.1f} s"


class _Silent(PlainProgress):
    """A dozen runs' lines are for nobody: metrics.jsonl of each has them."""

    def note(self, text: str) -> None:
        pass


def _progress() -> PlainProgress:
    progress = make_progress()
    return progress if isinstance(progress, LiveProgress) else _Silent(sys.stderr)


def _show(rows: list[Row]) -> None:
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        print(markdown_table(rows))
        return
    table = Table(box=None, padding=(0, 2))
    for column in COLUMNS:
        words = column in (COLUMNS[0], COLUMNS[-1])
        table.add_column(column, justify="left" if words else "right")
    for line in cells(rows):
        table.add_row(*line)
    console.print(table)


def _result(out: Path, rows: list[Row], stopped: str | None) -> dict:
    variants = [
        {
            "name": row.name,
            "parameters": row.parameters,
            "val_loss": row.val_loss and row.val_loss.mean,
            "interval": row.val_loss and row.val_loss.half_width,
            "n": row.val_loss.n if row.val_loss else 0,
            "difference": row.difference and row.difference.mean,
            "difference_interval": row.difference and row.difference.half_width,
            "tokens_per_second": row.tokens_per_second,
            "seconds": row.seconds,
            "remarks": row.remarks,
        }
        for row in rows
    ]
    result = {"out": str(out), "variants": variants}
    return result | ({"stopped_by": stopped} if stopped else {})
