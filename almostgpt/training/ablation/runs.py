"""The runs of an ablation: each variant with each seed, by the ordinary trainer, one after the other.

    <out>/runs/<variant>/seed-1337/    the run's folder, as `almostgpt train` makes it
                         result.json   how it ended, written when it has

A run that has ended is not done again; one that was stopped goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from almostgpt.config import Config, flatten, overlay, resolve
from almostgpt.config_file import load_config
from almostgpt.data.dataset import Dataset
from almostgpt.errors import UserError
from almostgpt.files import write_text
from almostgpt.training.ablation.variants import Variant
from almostgpt.training.metrics import finite
from almostgpt.training.progress import PlainProgress
from almostgpt.training.run import occupy, write_config
from almostgpt.training.trainer import Trainer, TrainingDiverged

RESULT = "result.json"
# What may differ between two calls: it changes neither a weight nor the loss that is compared.
FREE = {"training.log_every", "training.sample_every", "training.sample_tokens", "checkpoint.every"}
FREE |= {"checkpoint.keep", "training.eval_every"}


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    seed: int
    status: str  # finished | diverged | failed
    val_loss: float | None = None  # after the last step, nats per token
    loss: float | None = None  # of the last step
    tokens_per_second: float | None = None  # while training
    seconds: float | None = None  # spent training
    problem: str | None = None  # what stopped it


class Stopped(Exception):
    """A signal ended a run before its last step."""


def run_folder(out: Path, variant: Variant, seed: int) -> Path:
    """Where a variant is trained with a seed."""
    return out / "runs" / variant.folder / f"seed-{seed}"


def check_same_ablation(out: Path, variants: Sequence[Variant], seeds: Sequence[int]) -> None:
    """Raises ``UserError`` where ``out`` is in use for something else, or for other settings."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "runs").is_dir())):
        raise UserError(f"--out {out} exists and holds no ablation; name another folder")
    differing: dict[str, str] = {}
    for variant in variants:
        for seed in seeds:
            file = run_folder(out, variant, seed) / "config.yaml"
            if file.is_file():
                before, now = flatten(resolve(load_config(file))), flatten(_of(variant, seed))
                differing |= {
                    key: f"  {key}: {variant.name} has {before[key]!r}, now it would be {now[key]!r}"
                    for key in before
                    if before[key] != now[key] and key not in FREE
                }
    if differing:
        raise UserError(
            f"--out {out} holds runs with other settings, and they would not be comparable:\n"
            + "\n".join(differing.values())
            + "\nName another --out."
        )


def run_one(
    out: Path,
    variant: Variant,
    seed: int,
    dataset: Dataset,
    device: torch.device,
    progress: Callable[[], PlainProgress],
) -> Outcome:
    """Trains one variant with one seed, or what is left of it; reads how it ended if it has.

    Raises:
        Stopped: a signal came; all that was computed is kept.
    """
    run = run_folder(out, variant, seed)
    if (ended := _ended(run)) is not None:
        return ended
    begun = (run / "config.yaml").is_file()
    run.mkdir(parents=True, exist_ok=True)
    config = _of(variant, seed)
    try:
        with occupy(run):
            trainer = Trainer(config, dataset, run, device)
            write_config(run, config, new=not begun)
            result = trainer.train(progress())
    except TrainingDiverged as error:
        outcome = Outcome(seed, "diverged", problem=str(error))
    except UserError as error:  # it may be mended (memory, say), so it is tried again next time
        return Outcome(seed, "failed", problem=str(error))
    else:
        if "stopped_by" in result and result["steps"] < config.training.steps:
            raise Stopped(result["stopped_by"])
        outcome = _outcome(seed, finite(result))
    finally:
        trainer = None  # noqa: F841  # its model makes room for the next one's
        torch.compiler.reset()  # after a few models more, none would be compiled
    write_text(run / RESULT, json.dumps(asdict(outcome), allow_nan=False))
    return outcome


def _of(variant: Variant, seed: int) -> Config:
    return overlay(variant.config, {"seed": seed})


def _outcome(seed: int, result: dict[str, Any]) -> Outcome:
    if result["val_loss"] is None:  # what is not finite is nothing
        return Outcome(seed, "diverged", problem="the validation loss is not finite")
    kept = {key: result[key] for key in ("val_loss", "loss", "tokens_per_second", "seconds")}
    return Outcome(seed, "finished", **kept)


def _ended(run: Path) -> Outcome | None:
    try:
        return Outcome(**json.loads((run / RESULT).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{run / RESULT}: damaged; delete it, and the run goes on") from error
