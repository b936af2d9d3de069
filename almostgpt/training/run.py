"""The folder of a run: made anew, or found again for ``--resume``.

runs/<name>/  config.yaml  metrics.jsonl  samples.jsonl  loss.png  checkpoints/
"""

from __future__ import annotations

import dataclasses
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from almostgpt.config import Config, flatten, resolve
from almostgpt.config_file import load_config, to_yaml
from almostgpt.data.dataset import Dataset
from almostgpt.data.tokenizer import TOKENIZERS
from almostgpt.errors import UserError
from almostgpt.files import write_text
from almostgpt.training.schedule import learning_rate

# What may differ when a run goes on. Everything else decides what the next step computes.
RESUMABLE = {
    "training.steps",
    "training.log_every",
    "training.eval_every",
    "training.eval_batches",
    "training.sample_every",
    "training.sample_tokens",
    "checkpoint.every",
    "checkpoint.keep",
}

# What may differ where it changes no rate of the steps that were taken.
RATES = {"schedule.decay_steps", "schedule.decay_fraction"}


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


def discard_run_folder(run: Path) -> None:
    """Removes a new run folder in which nothing was begun."""
    (run / ".lock").unlink(missing_ok=True)
    with suppress(OSError):  # somebody has put something into it: it is theirs
        run.rmdir()


def new_run_folder(out: Path | None, name: str) -> Path:
    """Makes ``out``, or ``runs/<name>`` (``-2``, ``-3`` … when it exists)."""
    if out is not None:
        _refuse_used(out)
        out.mkdir(parents=True, exist_ok=True)
        return out
    wanted = Path("runs") / name
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        run = wanted if number == 1 else wanted.with_name(f"{name}-{number}")
        try:
            run.mkdir()
            return run
        except FileExistsError:  # also when another process was a moment faster
            number += 1


def _refuse_used(out: Path) -> None:
    """Hidden files do not count: a process killed at its very start leaves some."""
    used = out.exists() and (
        not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())
    )
    if used:
        hint = "add --resume to continue it, or " if (out / "config.yaml").exists() else ""
        raise UserError(f"--out {out} exists and is not empty; {hint}name another folder")


@contextmanager
def occupy(run: Path) -> Iterator[None]:
    """Keeps a second process out of the run: both would write the same metrics and checkpoints.

    The lock is the operating system's and ends with the process, however that ends.
    """
    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run}: another process is training in this run") from None
        yield


def write_config(run: Path, config: Config, *, new: bool) -> None:
    """Stores the settings that the run has from now on. Call it with the run occupied."""
    if new:
        _refuse_used(run)  # between the look and the lock another process may have begun here
    write_text(run / "config.yaml", to_yaml(config))


def stored_config(run: Path, newest_checkpoint: Path | None) -> Config:
    """The settings that the steps so far were taken with.

    They are in every checkpoint, under a checksum; before the first one, in the run's config.yaml.
    """
    return resolve(load_config((newest_checkpoint or run) / "config.yaml"))


def check_is_run(run: Path) -> None:
    """Raises ``UserError`` for a folder in which no run was started."""
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"--resume: there is no run in {run} (no config.yaml); start one without --resume"
        )


def resume_config(stored: Config, wanted: Config, step: int) -> Config:
    """``wanted``, if it differs from ``stored`` only where a run may change after ``step`` steps.

    Raises:
        UserError: every other difference, with both values.
    """
    before, after = flatten(stored), flatten(wanted)
    differing = {key for key in before if before[key] != after[key]} - RESUMABLE
    if differing & RATES and _same_rates(stored, wanted, step):
        differing -= RATES
    if differing:
        hint = ""
        if differing & RATES:
            hint = f"\n(The schedule may change, but not the rates of the {step} steps taken.)"
        refused = [
            f"  {key}: the run has {before[key]!r}, now {after[key]!r} is asked for"
            for key in before
            if key in differing
        ]
        raise UserError(
            "--resume continues a run as it was started; these settings cannot change:\n"
            + "\n".join(refused)
            + hint
            + "\nStart a new run for them (without --resume, with another --out)."
        )
    return wanted


def _same_rates(stored: Config, wanted: Config, step: int) -> bool:
    return all(learning_rate(stored, s) == learning_rate(wanted, s) for s in range(1, step + 1))
