"""Checkpoints: folders that are either whole or recognisably not.

    <run>/checkpoints/step-00001000/
        model.safetensors      weights
        optimizer.safetensors  optimizer state, one tensor a parameter and moment: "<parameter>/<moment>"
        trainer.json           step, loader position, random state, loss scale
        config.yaml            the resolved configuration
        tokenizer/             the tokenizer
        manifest.json          size and sha256 of each file above, written last

A checkpoint is written into a temporary folder, flushed to the disk and renamed, so a process killed
at any moment leaves the earlier ones as they were. Reading verifies the manifest first: a damaged
checkpoint is named on stderr and the one before it used. Nothing here can run code: no pickle.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from almostgpt.config import Config, overlay, resolve
from almostgpt.config_file import load_config, to_yaml
from almostgpt.data.tokenizer import Tokenizer, load_tokenizer
from almostgpt.device import pick_device
from almostgpt.errors import UserError
from almostgpt.files import expand, fsync_folder, sha256_of, write_text
from almostgpt.model import GPT
from almostgpt.model.quantized import quantize as quantized

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "trainer.json"
CONFIG, TOKENIZER, MANIFEST = "config.yaml", "tokenizer", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What training needs to go on, as read from a checkpoint folder."""

    folder: Path
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


# ---------------------------------------------------------------- writing


def save(
    run: Path,
    step: int,
    *,
    config: Config,
    tokenizer: Tokenizer,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes ``run/checkpoints/step-<step>`` and then removes all but the newest ``keep``.

    Raises ``OSError`` (a full disk, say) with the earlier checkpoints untouched.
    """
    parent = run / "checkpoints"
    parent.mkdir(exist_ok=True)
    final = parent / f"step-{step:08d}"
    temporary = parent / f".writing-{final.name}"
    for left_by_a_killed_process in parent.glob(".writing-*"):
        shutil.rmtree(left_by_a_killed_process)
    try:
        temporary.mkdir()
        _write_tensors(temporary / MODEL, weights)
        _write_tensors(temporary / OPTIMIZER, optimizer)
        write_text(temporary / STATE, json.dumps(state, indent=1))
        write_text(temporary / CONFIG, to_yaml(config))
        _complete(temporary, tokenizer)
        if final.exists():  # only a damaged one: a whole one would have been resumed from
            shutil.rmtree(final)
        _rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # One with a later step is damaged (training went on from before it): it does not count as kept.
    up_to_this = [folder for folder in _checkpoint_folders(run) if folder.name <= final.name]
    for old in up_to_this[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def export(folder: Path, model: GPT, tokenizer: Tokenizer, config: Config) -> None:
    """Writes a model without what training needs: a folder that ``load`` reads, and resuming does not.

    Args:
        folder: it must not exist; it appears when it is whole.
        config: of the run that the model comes from; the model's own shape takes the place of its.

    Raises:
        UserError: the folder exists.
        OSError: it cannot be written (a full disk, say); nothing is left of it then.
    """
    if folder.exists():
        raise UserError(f"{folder}: already exists")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    try:
        temporary.mkdir()
        _write_tensors(temporary / MODEL, model.state_dict())
        write_text(temporary / CONFIG, to_yaml(overlay(config, {"model": model.config})))
        _complete(temporary, tokenizer)
        _rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _complete(folder: Path, tokenizer: Tokenizer) -> None:
    """Adds the tokenizer, and the manifest of all that is there."""
    tokenizer.save(folder / TOKENIZER)
    write_text(folder / MANIFEST, json.dumps(_manifest(folder), indent=1))
    fsync_folder(folder)


def _rename(temporary: Path, final: Path) -> None:
    os.rename(temporary, final)
    fsync_folder(final.parent)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # wraps the operating system's errors in its own type
        raise OSError(f"{path}: {error}") from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _manifest(folder: Path) -> dict[str, dict]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of(p)}
        for p in files
    }


# ---------------------------------------------------------------- finding and verifying


def _checkpoint_folders(run: Path) -> list[Path]:
    """Oldest first, whole or not."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.is_dir())


def damage(folder: Path, *, resumable: bool = True) -> str | None:
    """Why ``folder`` is no whole checkpoint; ``None`` if it is one.

    Args:
        resumable: whether it must hold what training needs to go on, beside the model.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, expected in manifest.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
            if sha256_of(file) != expected["sha256"]:
                return f"the checksum of {name} is wrong"
        needed = (MODEL, CONFIG, *((OPTIMIZER, STATE) if resumable else ()))
        missing = [name for name in needed if name not in manifest]
        return f"{MANIFEST} does not list {missing[0]}" if missing else None
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        return f"{MANIFEST} is not readable"


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones on the way are named on stderr.

    Raises ``UserError`` if there are checkpoints and none is whole: starting again at step 0 would
    silently throw the run away.
    """
    folders = _checkpoint_folders(run)
    for folder in reversed(folders):
        reason = damage(folder)
        if reason is None:
            return folder
        print(f"warning: checkpoint {folder} is damaged ({reason}); not used", file=sys.stderr)
    if folders:
        raise UserError(f"{run}: none of its {len(folders)} checkpoints is whole")
    return None


def step_of(folder: Path | None) -> int:
    """The step after which a checkpoint was written, by its name; 0 without one."""
    return 0 if folder is None else int(folder.name.removeprefix("step-"))


def find(run_or_checkpoint: str | Path) -> Path:
    """The checkpoint folder that a run folder (its newest whole one) or a checkpoint folder means."""
    folder = expand(run_or_checkpoint)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run folder or a checkpoint folder")
    if (folder / MANIFEST).exists() or folder.name.startswith("step-"):
        reason = damage(folder, resumable=False)
        if reason is not None:
            raise UserError(
                f"{folder}: the checkpoint is damaged ({reason}); give the run folder to use another"
            )
        return folder
    found = newest(folder)
    if found is None and (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: a model of Hugging Face; make a checkpoint of it with "
            f"`almostgpt convert --from {folder} --to FOLDER`"
        )
    if found is None:
        raise UserError(f"{folder}: no checkpoint in it; a run folder holds checkpoints/step-…")
    return found


# ---------------------------------------------------------------- reading


def read(folder: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """The tensors and the trainer's state of a verified checkpoint folder."""
    return Checkpoint(
        folder=folder,
        weights=load_file(folder / MODEL, device=str(device)),
        optimizer=load_file(folder / OPTIMIZER, device=str(device)),
        state=json.loads((folder / STATE).read_text()),
    )


def load(
    run_or_checkpoint: str | Path,
    device: torch.device | str = "cpu",
    *,
    quantize: str = "none",
) -> tuple[GPT, Tokenizer]:
    """A trained model, in evaluation mode, and its tokenizer.

    Args:
        run_or_checkpoint: a run folder (its newest whole checkpoint) or one checkpoint folder.
        quantize: ``"int8"``: with matrices in 8 bits (``almostgpt.model.quantized``). One that was
            stored quantised is so whatever this says.

    Raises:
        UserError: nothing there, or damaged.
    """
    folder = find(run_or_checkpoint)
    config = resolve(load_config(folder / CONFIG))
    model = GPT(config.model)
    load_weights(model, load_file(folder / MODEL), folder)
    model = quantized(model.to(pick_device(str(device))), quantize).eval()
    return model, load_tokenizer(folder / TOKENIZER)


def load_weights(model: GPT, weights: Mapping[str, Tensor], source: Path) -> None:
    """Copies weights into the model; names and shapes must be exactly the model's."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{source}: the weights do not fit the model: {error}") from error
