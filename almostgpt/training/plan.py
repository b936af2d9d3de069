"""What training a configuration takes on a device, before it is begun: see docs/planning.md.

    make_plan(config, device) -> Plan

Nothing of it needs the data. Bytes and seconds come from a rehearsed step (rehearsal.py), FLOPs from
the formula that a run's MFU is made of.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import cycle
from pathlib import Path

import torch

from almostgpt.config import Config, overlay
from almostgpt.data.dataset import TOKENIZER_FILE
from almostgpt.data.tokenizer import TOKENIZERS, CharTokenizer, load_tokenizer
from almostgpt.errors import UserError
from almostgpt.files import expand
from almostgpt.model import GPT
from almostgpt.model.checkpointing import CHECKPOINTING
from almostgpt.training.metrics import flops_per_token
from almostgpt.training.rehearsal import (
    StepBytes,
    StepSeconds,
    state_bytes,
    step_bytes,
    step_seconds,
)

# Of the free memory, what a plan leaves alone: buffers inside of operations, and what an allocator
# loses to rounding and to gaps. On a CPU it keeps what is freed (process.py): a GPT-2 of two layers
# had 21 to 26 % more resident than its tensors take (2 cores of an AMD EPYC, 2026-11-21).
MARGINS = {"cpu": 0.3, "cuda": 0.1, "mps": 0.1}
# Rows of a character vocabulary that is not known yet: English text has 60 to 100 characters, and with
# model.vocab_multiple at its default all of 65 to 128 make the same model.
CHARACTERS = 128
# Tokens of a micro-batch that the loss takes in several parts, on a GPU too (chunk_budget).
LINEAR_FROM = 8192


@dataclass(frozen=True)
class Fit:
    """How a micro-batch fits into the memory of the device."""

    free_bytes: int
    usable_bytes: int  # of them, but for the margin
    largest_micro_batch: int  # rows of block_size tokens; 0: not even one


@dataclass(frozen=True)
class Duration:
    """Seconds that a run is expected to take; checkpoints and samples are left out."""

    step: float
    training: float  # all steps
    evaluation: float  # all validations
    run: float  # both
    tokens_per_second: float  # while training
    ends: str  # ISO 8601, if it is begun now
    measured: str  # what it was found with


@dataclass(frozen=True)
class Plan:
    """Everything that ``almostgpt info --plan`` shows."""

    device: str
    vocab_size: int
    parameters: int
    flops_per_token: float  # forward and backward, as of MFU
    tokens_per_step: int
    tokens: int  # of the whole run
    checkpointing: dict[str, StepBytes]  # a step's bytes by model.gradient_checkpointing
    fit: Fit
    duration: Duration | None  # None: not even one row fits, so nothing was measured
    notes: list[str]  # what was assumed, and what does not fit


def make_plan(config: Config, device: torch.device) -> Plan:
    """Plans the training of ``config`` (resolved) on ``device``; measures there for a few seconds.

    Raises:
        UserError: a vocabulary that cannot be known without the data, or a model whose weights,
            gradients and optimizer state alone do not fit.
    """
    vocab_size, notes = vocabulary(config)
    config = overlay(config, {"model.vocab_size": vocab_size})
    free = free_memory(device)
    usable = int(free * (1 - MARGINS[device.type]))
    with torch.device("meta"):
        model = GPT(config.model)
    _refuse_too_large(config, model, usable, device)
    checkpointing = {
        kind: step_bytes(overlay(config, {"model.gradient_checkpointing": kind}), device)
        for kind in CHECKPOINTING
    }

    fit = Fit(free, usable, largest_micro_batch(peak_by_rows(config, device), usable))
    notes += _notes(config, fit)
    duration = None
    if fit.largest_micro_batch:
        duration = expected_duration(
            config,
            step_seconds(config, device, fit.largest_micro_batch),
            datetime.now().astimezone(),
        )
    tokens = config.training.batch_size * config.training.accumulate * config.model.block_size
    return Plan(
        device=str(device),
        vocab_size=vocab_size,
        parameters=model.num_parameters(),
        flops_per_token=flops_per_token(model, config.model.block_size),
        tokens_per_step=tokens,
        tokens=tokens * config.training.steps,
        checkpointing=checkpointing,
        fit=fit,
        duration=duration,
        notes=notes,
    )


# ---------------------------------------------------------------- vocabulary


def vocabulary(config: Config) -> tuple[int, list[str]]:
    """The number of token ids, and in words what had to be assumed for it.

    It is what ``model.vocab_size`` says, else of the tokenizer in the prepared folder ``data.path`` (of
    a mixture, the first of them),
    else of the one that ``data.tokenizer`` names, if that is known without a text.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size, []
    path = next(iter(config.data.mixture), None) if config.data.mixture else config.data.path
    prepared = expand(path) if path is not None else None
    if prepared is not None and (prepared / TOKENIZER_FILE).is_file():
        return load_tokenizer(prepared).vocab_size, []
    name = config.data.tokenizer
    if name == CharTokenizer.name:
        assumed = (
            f"a vocabulary of {CHARACTERS} characters is assumed, for the text is not read here; "
            "--model.vocab-size says another"
        )
        return CHARACTERS, [assumed]
    # A kind that always has the same ids says how many without being loaded.
    known = getattr(TOKENIZERS.get(name), "vocab_size", None)
    return known or load_tokenizer(name).vocab_size, []


# ---------------------------------------------------------------- memory


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still claim: of the GPU, or else of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    # No system but Linux tells what is free: all there is, then.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_by_rows(config: Config, device: torch.device) -> Callable[[int], int]:
    """The peak of a step as a function of the rows of a micro-batch.

    Rehearsed up to ``LINEAR_FROM`` tokens and twice as many; from there on it is a straight line. The
    loss then works in parts of one size, so nothing but what grows with the tokens is added, and to
    rehearse more would take as long as there are parts.
    """
    few = max(1, -(-LINEAR_FROM // config.model.block_size))

    @functools.cache
    def rehearsed(rows: int) -> int:
        return step_bytes(overlay(config, {"training.batch_size": rows}), device).peak

    def peak(rows: int) -> int:
        if rows <= 2 * few:
            return rehearsed(rows)
        a_row = (rehearsed(2 * few) - rehearsed(few)) / few
        return rehearsed(2 * few) + int(a_row * (rows - 2 * few))

    return peak


def largest_micro_batch(peak: Callable[[int], int], usable: int) -> int:
    """The most rows for which ``peak(rows)``, which must not fall, is at most ``usable``; 0: not one.

    A peak is nearly linear in the rows, so the chord between a batch that fits and one that does not
    leads to the largest in a few steps; a bisection now and then bounds their number.
    """
    if peak(1) > usable:
        return 0
    fits, too_many = 1, 4
    while peak(too_many) <= usable:
        fits, too_many = too_many, 4 * too_many
    by_chord = cycle((True, True, False))
    while too_many - fits > 1:
        share = (usable - peak(fits)) / (peak(too_many) - peak(fits)) if next(by_chord) else 0.5
        guess = fits + int(share * (too_many - fits))
        guess = min(max(guess, fits + 1), too_many - 1)
        if peak(guess) <= usable:
            fits = guess
        else:
            too_many = guess
    return fits


def _refuse_too_large(config: Config, model: GPT, usable: int, device: torch.device) -> None:
    states = state_bytes(config, device)
    if states <= usable:
        return
    in_a_block = sum(p.numel() for p in model.blocks[0].parameters())
    layers = int(
        config.model.n_layer - (states - usable) * model.num_parameters() / states / in_a_block
    )
    fewer = f"model.n_layer={layers} would" if layers > 0 else "not even one layer would"
    raise UserError(
        f"{model.num_parameters():,} parameters, their gradients and the optimizer state take "
        f"{states / 1e9:.1f} GB, but {device} has {usable / 1e9:.1f} GB to use; of this width {fewer} "
        "fit, with no memory left for activations"
    )


def _notes(config: Config, fit: Fit) -> list[str]:
    training, largest = config.training, fit.largest_micro_batch
    notes = []
    if largest == 0:
        kept = config.model.gradient_checkpointing != "full"
        notes.append(
            "not even one row fits: take a smaller model.block_size or model"
            + (", or model.gradient_checkpointing=full" if kept else "")
        )
    elif largest < training.batch_size:
        rows = training.batch_size * training.accumulate
        fitting = max(n for n in range(1, largest + 1) if rows % n == 0)
        notes.append(
            f"training.batch_size={training.batch_size} does not fit; the same step in parts that "
            f"fit: training.batch_size={fitting}, training.accumulate={rows // fitting}"
        )
    if training.compile:
        notes.append(
            "training.compile is left out: a compiled model takes less time a step and less memory"
        )
    if config.data.documents == "packed":
        notes.append("every row is taken as one document: shorter ones need less time")
    return notes


# ---------------------------------------------------------------- time


def expected_duration(config: Config, seconds: StepSeconds, start: datetime) -> Duration:
    """What a run takes whose parts take so many seconds, if it begins at ``start``."""
    training = config.training
    step = training.accumulate * seconds.micro_batch + seconds.update
    every = training.eval_every or training.steps
    validations = -(-training.steps // every)  # one is always after the last step
    evaluation = validations * training.eval_batches * seconds.evaluation
    run = training.steps * step + evaluation
    tokens = training.batch_size * training.accumulate * config.model.block_size
    whole = seconds.layers == config.model.n_layer
    return Duration(
        step=step,
        training=training.steps * step,
        evaluation=evaluation,
        run=run,
        tokens_per_second=tokens / step,
        ends=(start + timedelta(seconds=run)).isoformat(timespec="seconds"),
        measured=(
            f"steps of {'the whole model' if whole else f'{seconds.layers} of its layers'} "
            f"with {seconds.rows} of {training.batch_size} rows"
        ),
    )
