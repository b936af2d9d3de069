"""``almostgpt info --config``: which backend each part of a model would use, and why."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

import torch
from rich.console import Console

from almostgpt.backends import Use, generation_uses, training_uses
from almostgpt.cli.arguments import Settings, capability, parse
from almostgpt.cli.settings import DEFAULT_PRESET, Beginning
from almostgpt.config import overlay
from almostgpt.device import pick_device
from almostgpt.errors import UserError
from almostgpt.kernels.dispatch import check_card
from almostgpt.training.plan import vocabulary

DESCRIPTION = """Shows which backend each part of a model would use for a training step and for decoding one
token with a cache, and why no other. Every setting of almostgpt train can be given. Nothing is
computed: the model's own calls are watched on tensors without data.

examples:
  almostgpt info --config quickstart
  almostgpt info --config gpt2-124m --capability 9.0              on an H100, which need not be here
  almostgpt info --config quickstart --model.norm layernorm --model.quantize int8 --json"""


@dataclass(frozen=True)
class ModelArguments:
    settings: Settings
    config: str = DEFAULT_PRESET  # a built-in preset, or a YAML file
    capability: str | None = None  # compute capability of a card that need not be here, such as 9.0
    json: bool = False  # one JSON object on stdout instead of the tables


def is_about_model(arguments: list[str]) -> bool:
    """Whether settings are given: then it is a model that is asked about."""
    names = (argument.partition("=")[0] for argument in arguments)
    return any(name in ("--config", "--init") or name.startswith("--model.") for name in names)


def run_model(arguments: list[str]) -> int:
    """The command, with the arguments that follow ``info``."""
    begin = Beginning.of(arguments)
    given = parse(
        ModelArguments,
        arguments,
        prog="almostgpt info --config",
        description=DESCRIPTION,
        default=ModelArguments(settings=begin.defaults, config=begin.preset),
    )
    config = begin.complete(given.settings)
    vocab_size, notes = vocabulary(config)
    config = overlay(config, {"model.vocab_size": vocab_size})
    card = None if given.capability is None else check_card(capability(given.capability))
    if card is not None and config.device != "auto":
        raise UserError("--capability asks about a card that need not be here: leave --device out")
    device = pick_device(config.device) if card is None else torch.device("cpu")
    where = str(device) if card is None else f"a GPU of compute capability {given.capability}"
    found = {"generation": generation_uses(config, device, card)}
    if config.model.quantize == "none":
        found = {"training": training_uses(config, device, card), **found}
    else:
        notes = [*notes, f"model.quantize={config.model.quantize} cannot be trained"]
    if given.json:
        report = {"config": given.config, "where": where, "notes": notes}
        print(json.dumps(report | {task: list(map(asdict, uses)) for task, uses in found.items()}))
        return 0
    precision = config.training.precision
    titles = {
        "training": f"training, {precision}, {config.training.batch_size} x {config.model.block_size} tokens",
        "generation": "generation, a token with a cache",
    }
    console = Console(file=sys.stdout, highlight=False)
    for task, uses in found.items():
        console.print(f"{given.config} on {where}: {titles[task]}", style="bold", markup=False)
        _show(console, uses)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    return 0


def _show(console: Console, uses: list[Use]) -> None:
    """A line an op below a line a part; reasons once, at the end."""

    def line(text: str, **options) -> None:
        console.print(text, markup=False, soft_wrap=True, **options)

    before = None
    for use in uses:
        blocks = ("block " if len(use.blocks) == 1 else "blocks ") + _ranges(use.blocks)
        part = f"{blocks} {use.part}" if use.blocks else use.part
        part += f" ({use.kind})" if use.kind else ""
        if part != before:
            line(f"  {part}")
            before = part
        if use.op is None:
            line(f"    {use.backend}, by {use.kernel}")
            continue
        modules = f" ({', '.join(use.modules)})" if use.modules else ""
        line(f"    {use.op}{modules}: {use.backend} ({use.kernel}), given {', '.join(use.dtypes)}")
    reasons = {(use.op, *reason): None for use in uses for reason in use.reasons.items()}
    for op in dict.fromkeys(use.op for use in uses if use.op):
        none = [b for o, b, why in reasons if o == op and why == f"no {b} kernel for this op"]
        for _, backend, why in (r for r in reasons if r[0] == op and r[1] not in none):
            line(f"  {op}: not {backend}: {why}", style="dim")
        if none:
            line(f"  {op}: no kernel of {', '.join(none)}", style="dim")
    console.print()


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 4) as ``0-2, 4``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
