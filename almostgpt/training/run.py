"""The folder of a run: made anew, or found again for ``--resume``.

runs/<name>/  config.yaml  metrics.jsonl  samples.txt  loss.png  checkpoints/
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from almostgpt.config import Config, flatten, resolve
from almostgpt.config_file import load_config, to_yaml
from almostgpt.errors import UserError
from almostgpt.files import write_text

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


def create_run(config: Config, out: Path | None, name: str) -> Path:
    """Makes the folder ``out``, or ``runs/<name>`` (``-2``, ``-3`` … when it exists), with config.yaml."""
    if out is not None:
        if out.exists() and (not out.is_dir() or _visible(out)):
            hint = "; add --resume to continue it" if (out / "config.yaml").exists() else ""
            raise UserError(f"--out {out}: exists and is not empty{hint}, or name another folder")
        out.mkdir(parents=True, exist_ok=True)
        run = out
    else:
        run = _numbered(Path("runs") / name)
    write_text(run / "config.yaml", to_yaml(config))
    return run


def _visible(folder: Path) -> bool:
    """Whether it holds anything but the hidden left-overs of a process killed at its very start."""
    return any(not path.name.startswith(".") for path in folder.iterdir())


def _numbered(wanted: Path) -> Path:
    number = 1
    while True:
        run = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:  # also when another process was a moment faster
            number += 1


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


def discard_run(run: Path) -> None:
    """Removes a run folder in which nothing was begun."""
    for name in (".lock", "config.yaml"):
        (run / name).unlink(missing_ok=True)
    run.rmdir()


def stored_config(run: Path) -> Config:
    """The resolved configuration that a run was started with."""
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"--resume: there is no run in {run} (no config.yaml); start one without --resume"
        )
    return resolve(load_config(run / "config.yaml"))


def resume_config(stored: Config, wanted: Config) -> Config:
    """``wanted``, if it differs from ``stored`` only where a run may change under way.

    Raises:
        UserError: every other difference, with both values.
    """
    before, after = flatten(stored), flatten(wanted)
    refused = [
        f"  {key}: the run has {before[key]!r}, now {after[key]!r} is asked for"
        for key in before
        if before[key] != after[key] and key not in RESUMABLE
    ]
    if refused:
        raise UserError(
            "--resume continues a run as it was started; these settings cannot change:\n"
            + "\n".join(refused)
            + "\nStart a new run for them (without --resume, with another --out)."
        )
    return wanted
