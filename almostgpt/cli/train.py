"""``almostgpt train``: one run, from text to a trained checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from almostgpt import checkpoint
from almostgpt.cli.arguments import Settings, parse
from almostgpt.config import Config, overlay, resolve
from almostgpt.config_file import find_config, read_settings, to_yaml
from almostgpt.data.dataset import Dataset
from almostgpt.data.prepare import cached_dataset
from almostgpt.data.tokenizer import TOKENIZERS
from almostgpt.device import pick_device
from almostgpt.errors import UserError
from almostgpt.files import expand
from almostgpt.model.gpt import part_problems
from almostgpt.training.progress import make_progress
from almostgpt.training.run import (
    check_is_run,
    discard_run_folder,
    new_run_folder,
    occupy,
    resume_config,
    stored_config,
    write_config,
)
from almostgpt.training.trainer import Trainer

DESCRIPTION = """Trains a model and writes checkpoints, metrics.jsonl and loss.png into a run folder.
The last line on stdout is a JSON object with the result.

examples:
  almostgpt train                                      the quickstart, on built-in text
  almostgpt train --data.path book.txt --training.steps 2000
  almostgpt train --data.path texts/ --data.tokenizer byte --data.documents packed
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
    newest = stored = None
    base = Config()
    if early.resume:
        if early.out is None:
            raise UserError("--resume needs --out DIR, the run folder to continue")
        out = expand(early.out)
        check_is_run(out)
        newest = checkpoint.newest(out)
        stored = stored_config(out, newest)
        base = overlay(base, read_settings(out / "config.yaml"))
    # What the command line does not say comes from the file; on a resumed run, from the run.
    preset = early.config if early.config is not None or early.resume else "quickstart"
    if preset is not None:
        base = overlay(base, read_settings(preset))
    given = parse(
        TrainArguments,
        arguments,
        prog="almostgpt train",
        description=DESCRIPTION,
        default=TrainArguments(settings=base, config=preset or "quickstart"),
    )
    config = resolve(_absolute_paths(given.settings))
    if problems := part_problems(config.model):
        raise UserError("\n".join(problems))
    if stored is not None:
        config = resume_config(stored, config, checkpoint.step_of(newest))
    if given.print_config:
        print(to_yaml(config), end="")
        return 0

    device = pick_device(config.device)
    dataset = cached_dataset(config.data)
    config = with_vocabulary(config, dataset)
    folder = expand(given.out) if given.out is not None else None
    fresh = not early.resume and (folder is None or not folder.exists())
    if not early.resume:
        folder = new_run_folder(folder, find_config(given.config).stem)
    with occupy(folder):
        try:
            trainer = Trainer(config, dataset, folder, device, resume_from=newest)
        except BaseException:
            if fresh:
                discard_run_folder(folder)
            raise
        write_config(folder, config, new=not early.resume)
        progress = make_progress()
        progress.note(_headline(trainer))
        result = trainer.train(progress)
    print(json.dumps(result))
    return 0


def _headline(trainer: Trainer) -> str:
    config, step = trainer.config, trainer.step_number
    if step >= config.training.steps:
        start = f"already at step {step} of {config.training.steps}: nothing to do"
    else:
        start = f"resuming at step {step}" if step else "starting"
    return (
        f"{trainer.run}: {start} · {trainer.model.num_parameters():,} parameters · "
        f"{trainer.dataset.train_tokens:,} training tokens · {trainer.device} · "
        f"{config.training.precision}"
    )


def _early_arguments(arguments: list[str]) -> argparse.Namespace:
    """The options that decide where the defaults of all others come from."""
    early = argparse.ArgumentParser("almostgpt train", add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--out")
    early.add_argument("--resume", action="store_true")
    return early.parse_known_args(arguments)[0]


def _absolute_paths(config: Config) -> Config:
    """So that the run can be continued from another folder."""
    data = config.data
    if data.path is not None:
        data = dataclasses.replace(data, path=str(expand(data.path).absolute()))
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
    data = config.data
    if data.tokenizer in TOKENIZERS:  # a prepared folder brings its own, which is what was used
        data = dataclasses.replace(data, tokenizer=dataset.tokenizer.name)
    return dataclasses.replace(config, model=model, data=data)
