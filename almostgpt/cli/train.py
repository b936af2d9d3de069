"""``almostgpt train``: one run, from text to a trained checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from almostgpt.cli.arguments import Settings, parse
from almostgpt.config import Config, overlay, resolve
from almostgpt.config_file import find_config, read_settings, to_yaml
from almostgpt.data.dataset import Dataset
from almostgpt.data.prepare import cached_dataset
from almostgpt.device import pick_device
from almostgpt.errors import UserError
from almostgpt.model.gpt import part_problems
from almostgpt.training.progress import make_progress
from almostgpt.training.run import create_run, discard_run, occupy, resume_config, stored_config
from almostgpt.training.trainer import Trainer

DESCRIPTION = """Trains a model and writes checkpoints, metrics.jsonl and loss.png into a run folder.
The last line on stdout is a JSON object with the result.

examples:
  almostgpt train                                      the quickstart, on built-in text
  almostgpt train --data.path book.txt --training.steps 2000
  almostgpt train --config shakespeare-char --device cuda --training.precision bf16
  almostgpt train --config my.yaml --out runs/mine     a file of your own (base: quickstart)
  almostgpt train --out runs/mine --resume             go on exactly where the run stopped
  almostgpt train --config gpt2-124m --print-config    the resolved settings, and nothing else"""


@dataclass(frozen=True)
class TrainArguments:
    settings: Settings
    config: str = "quickstart"  # a built-in preset, or a YAML file
    out: Path | None = None  # the run folder; default runs/<config>, numbered when it exists
    resume: bool = False  # continue the run in --out from its newest whole checkpoint
    print_config: bool = False  # print the resolved settings as YAML and stop


def run(arguments: list[str]) -> int:
    early = _early_arguments(arguments)
    stored = None
    if early.resume:
        if early.out is None:
            raise UserError("--resume needs --out DIR, the run folder to continue")
        stored = stored_config(Path(early.out))
    # What the command line does not say comes from the file; on a resumed run, from the run.
    settings = read_settings(early.config or "quickstart") if early.config or stored is None else {}
    default = TrainArguments(
        settings=overlay(stored or Config(), settings), config=early.config or "quickstart"
    )
    given = parse(
        TrainArguments, arguments, prog="almostgpt train", description=DESCRIPTION, default=default
    )
    config = resolve(_absolute_paths(given.settings))
    problems = part_problems(config.model)
    if problems:
        raise UserError("\n".join(problems))
    if stored is not None:
        config = resume_config(stored, config)
    if given.print_config:
        print(to_yaml(config), end="")
        return 0

    device = pick_device(config.device)
    dataset = cached_dataset(config.data)
    config = with_vocabulary(config, dataset)
    if stored is None:
        folder = create_run(config, given.out, find_config(given.config).stem)
    else:
        folder = given.out
    with occupy(folder):
        try:
            trainer = Trainer(config, dataset, folder, device)
        except UserError:
            if stored is None:
                discard_run(folder)
            raise
        progress = make_progress()
        start = f"resuming at step {trainer.step_number}" if trainer.step_number else "starting"
        progress.note(
            f"{folder}: {start} · {trainer.model.num_parameters():,} parameters · "
            f"{dataset.train_tokens:,} training tokens · {device} · {config.training.precision}"
        )
        result = trainer.train(progress)
    print(json.dumps(result))
    return 0


def _early_arguments(arguments: list[str]) -> argparse.Namespace:
    """The options that decide where the defaults of all others come from."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--out")
    early.add_argument("--resume", action="store_true")
    return early.parse_known_args(arguments)[0]


def _absolute_paths(config: Config) -> Config:
    """So that the run can be continued from another folder."""
    data = config.data
    if data.path is not None:
        data = dataclasses.replace(data, path=str(Path(data.path).expanduser().absolute()))
    if Path(data.tokenizer).is_dir():
        data = dataclasses.replace(data, tokenizer=str(Path(data.tokenizer).absolute()))
    return dataclasses.replace(config, data=data)


def with_vocabulary(config: Config, dataset: Dataset) -> Config:
    """``model.vocab_size`` from the tokenizer, unless the configuration asks for more.

    More is room for ids to come, or a way to measure a larger vocabulary; text is made from the
    tokenizer's ids alone.
    """
    wanted, needed = config.model.vocab_size, dataset.vocab_size
    if wanted is not None and wanted < needed:
        raise UserError(f"model.vocab_size is {wanted}, but the tokenizer has {needed} ids")
    model = dataclasses.replace(config.model, vocab_size=wanted or needed)
    return dataclasses.replace(config, model=model)
