"""The folder of a run: made anew, or found again for ``--resume``.

runs/<name>/  config.yaml  metrics.jsonl  samples.txt  loss.png  checkpoints/
"""

from __future__ import annotations

from pathlib import Path

from almostgpt.config import Config, flatten, load_config, resolve, to_yaml
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
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            hint = "; add --resume to continue it" if (out / "config.yaml").exists() else ""
            raise UserError(f"--out {out}: exists and is not empty{hint}, or name another folder")
        out.mkdir(parents=True, exist_ok=True)
        run = out
    else:
        run = _numbered(Path("runs") / name)
    write_text(run / "config.yaml", to_yaml(config))
    return run


def _numbered(wanted: Path) -> Path:
    number = 1
    while True:
        run = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:  # also when another process was a moment faster
            number += 1


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
        f"  {key}: the run has {before[key]!r}, now {after[key]!r} was asked for"
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
