"""``almostgpt train``: one run, from text to a trained checkpoint."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from almostgpt import checkpoint
from almostgpt.cli.arguments import Settings, parse
from almostgpt.cli.settings import DEFAULT_PRESET, Beginning, absolute_paths, checked
from almostgpt.config import Config, overlay
from almostgpt.config_file import find_config, read_settings, to_yaml
from almostgpt.data.prepare import cached_dataset
from almostgpt.data.tokenizer import Tokenizer, load_tokenizer
from almostgpt.device import pick_device
from almostgpt.errors import UserError
from almostgpt.files import expand
from almostgpt.training.initial import Initial, read_initial, remark, settings_beside
from almostgpt.training.progress import make_progress
from almostgpt.training.run import (
    check_is_run,
    discard_run_folder,
    new_run_folder,
    occupy,
    resume_config,
    stored_config,
    with_vocabulary,
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
  almostgpt train --init runs/mine --data.path new.txt --optimizer.lr 1e-4     fine-tune its weights
  almostgpt train --config gpt2-124m --print-config    the resolved settings, and nothing else"""


@dataclass(frozen=True)
class TrainArguments:
    settings: Settings
    config: str = DEFAULT_PRESET  # a built-in preset, or a YAML file
    out: Path | None = None  # the run folder; default runs/<config>, numbered when it exists
    resume: bool = False  # continue the run in --out from its newest whole checkpoint
    print_config: bool = False  # print the resolved settings as YAML and stop


def run(arguments: list[str]) -> int:
    early = _early_arguments(arguments)
    newest = stored = initial = None
    if early.resume:
        if early.out is None:
            raise UserError("--resume needs --out DIR, the run folder to continue")
        out = expand(early.out)
        check_is_run(out)
        newest = checkpoint.newest(out)
        stored = stored_config(out, newest)
        preset, base = early.config or DEFAULT_PRESET, _stored_defaults(out, stored, early.config)
    else:
        begin = Beginning.of(arguments)
        preset, base, initial = begin.preset, begin.defaults, begin.initial
    given = parse(
        TrainArguments,
        arguments,
        prog="almostgpt train",
        description=DESCRIPTION,
        default=TrainArguments(settings=base, config=preset),
    )
    if stored is None:
        config = begin.complete(given.settings)
    else:
        config = _same_beginning(checked(absolute_paths(given.settings)), stored)
        config = resume_config(stored, config, checkpoint.step_of(newest))
    if given.print_config:
        print(to_yaml(config), end="")
        return 0

    device = pick_device(config.device)
    dataset = cached_dataset(config.data, tokenizer=_models_tokenizer(config, initial, newest))
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
        if initial is not None:
            progress.note(remark(initial, config))
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


def _stored_defaults(run: Path, stored: Config, preset: str | None) -> Config:
    """What the command line does not say when a run goes on: the file, if one is named, then the run."""
    base = overlay(Config(), read_settings(run / "config.yaml"))
    if preset is None:
        return base
    settings = read_settings(preset)
    if stored.init is not None:
        settings = settings_beside(settings, read_settings(preset, presets=False))
    return overlay(base, settings)


def _same_beginning(config: Config, stored: Config) -> Config:
    """``--init RUN``, repeated when a run goes on, means the checkpoint that it meant at first."""
    if config.init not in (None, stored.init):
        with suppress(UserError):  # it is gone: that it is another name is what will be said
            if str(checkpoint.find(config.init)) == stored.init:
                return overlay(config, {"init": stored.init})
    return config


def _models_tokenizer(
    config: Config, initial: Initial | None, newest: Path | None
) -> Tokenizer | None:
    """The tokenizer of the weights that a run began with; None: it began with new ones."""
    if config.init is None:
        return None
    if newest is not None:
        return load_tokenizer(newest / checkpoint.TOKENIZER)
    try:
        return (initial or read_initial(config.init)).tokenizer
    except UserError as error:
        raise UserError(
            "--resume: the run has no checkpoint yet, so it needs the weights that it began with "
            f"(--init): {error}. Bring them back, or start a new run"
        ) from error
