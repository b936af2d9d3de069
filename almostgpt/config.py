"""Every setting of AlmostGPT: one tree of dataclasses, their derived values and their checks.

``config_model.py`` holds those of the model, ``config_file.py`` reads the tree from YAML and writes it back.

    load_config(name_or_file) -> Config -> resolve(config) -> Config with every derived value filled in
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from almostgpt.config_model import MAX_INT, GPTConfig, model_problems, resolve_model
from almostgpt.errors import UserError, not_one_of

MAX_SEED = 2**64 - 1  # of torch's generators

# Settings that were switches once, and what false and true of an older file mean now.
FORMER_SWITCHES = {"model.gradient_checkpointing": ("none", "full")}


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes windows of tokens."""

    path: str | None = None  # file, folder, 'pattern/**/*.jsonl.zst', hf://OWNER/NAME; or prepared
    corpus: str = "stdlib"  # what the text is and how it is cleaned: a name in CORPORA, or text
    column: str | None = None  # of a table: the one with the text; null: what the corpus calls it
    min_length: int = 0  # characters; documents with fewer are dropped
    deduplicate: bool = False  # drop documents whose text was there before
    normalize: str = "none"  # none | NFC | NFKC: the form of Unicode
    tokenizer: str = "char"  # char | byte | gpt2, or a folder with a saved one or tokenizer.json
    split: str = "tail"  # tail: the last part of the text validates; document: whole documents do
    val_fraction: float = 0.1  # share of the text (or of the documents) kept for validation
    sampling: str = "random"  # random | sequential | shuffled windows | documents, shuffled
    documents: str = "ignore"  # packed: no token attends to another document | ignore: it may
    mixture: dict[str, float] | None = None  # in place of path: several of them, and their weights
    shard_tokens: int = 100_000_000  # tokens in one shard file


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for the blocks' matrices and AdamW for the rest; decay touches matrices only."""

    name: str = "adamw"  # adamw | muon
    lr: float = 1e-3  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW: decay of the first and second moment
    momentum: float = 0.95  # Muon: decay of its one moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled, on parameters with two or more dimensions
    clip: float = 1.0  # largest global gradient norm; 0 switches clipping off


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the steps: linear warm-up, then the named decay."""

    name: str = "cosine"  # cosine | wsd (stable, then linear) | constant
    warmup_steps: int = 100  # steps from 0 to the peak
    decay_steps: int | None = None  # step at which min_lr is reached; null is training.steps
    decay_fraction: float = 0.1  # wsd: share of decay_steps, the last ones, in which the rate falls
    min_lr: float | None = None  # where the decay ends; null is a tenth of optimizer.lr


@dataclass(frozen=True)
class TrainingConfig:
    """The loop: how much, how often it reports, in which precision."""

    steps: int = 1000  # optimizer steps in all
    batch_size: int = 16  # sequences in a micro-batch
    accumulate: int = 1  # micro-batches in a step
    log_every: int = 10  # steps between lines of metrics.jsonl
    eval_every: int = 250  # steps between validations; 0: only after the last step
    eval_batches: int = 20  # fixed validation batches
    sample_every: int = 0  # steps between samples from the model; 0: none
    sample_tokens: int = 200  # length of such a sample
    precision: str = "fp32"  # fp32 | bf16 (autocast) | fp16 (autocast and loss scaling)
    matmul: str = "highest"  # float32 products: highest | high (TF32 on a GPU) | medium (bf16, too)
    compile: bool = False  # torch.compile the model


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = 250  # steps between checkpoints; the last step always writes one
    keep: int = 2  # newest checkpoints kept, at least 2


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: str | None = None  # run, checkpoint or exported folder: weights to begin with
    seed: int = 1337  # of weights, batches and dropout
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps


# ---------------------------------------------------------------- derived values and checks


def resolve(config: Config, parts: Mapping[str, Collection[str]] | None = None) -> Config:
    """Fills every derived value and checks the whole tree; raises one ``UserError`` for all problems.

    ``model.vocab_size`` stays ``None`` until the tokenizer is known. Pure: reads nothing but its
    argument, so that a stored configuration means the same on every machine. ``parts`` as of
    ``model_problems``.
    """
    problems = config_problems(config, parts)
    if problems:
        raise UserError("the configuration cannot work:\n" + "\n".join(f"  {p}" for p in problems))
    schedule = dataclasses.replace(
        config.schedule,
        decay_steps=_first(config.schedule.decay_steps, config.training.steps),
        min_lr=_first(config.schedule.min_lr, config.optimizer.lr / 10),
    )
    return dataclasses.replace(config, model=resolve_model(config.model), schedule=schedule)


def config_problems(
    config: Config, parts: Mapping[str, Collection[str]] | None = None
) -> list[str]:
    """What is impossible about a configuration, each as ``section.key: reason``; ``parts`` likewise."""
    values = flatten(config)
    for key, value in values.items():
        limit = MAX_SEED if key == "seed" else MAX_INT
        if isinstance(value, int) and value > limit:
            return [f"{key} is {value}, but must be at most {limit}"]
    problems = model_problems(config.model, parts)
    lowest = {
        "training.steps": 1,
        "training.batch_size": 1,
        "training.accumulate": 1,
        "training.log_every": 1,
        "training.eval_every": 0,
        "training.eval_batches": 1,
        "training.sample_every": 0,
        "training.sample_tokens": 1,
        "checkpoint.every": 1,
        "checkpoint.keep": 2,
        "schedule.warmup_steps": 0,
        "schedule.decay_steps": 1,
        "schedule.min_lr": 0,
        "optimizer.lr": 0,
        "optimizer.eps": 0,
        "optimizer.weight_decay": 0,
        "optimizer.clip": 0,
        "data.shard_tokens": 1,
        "data.min_length": 0,
        "seed": 0,
    }
    for key, minimum in lowest.items():
        if values[key] is not None and not values[key] >= minimum:
            problems.append(f"{key} is {values[key]}, but must be at least {minimum}")
    choices = {
        "training.precision": ("fp32", "bf16", "fp16"),
        "training.matmul": ("highest", "high", "medium"),
        "schedule.name": ("cosine", "wsd", "constant"),
        "optimizer.name": ("adamw", "muon"),
        "data.split": ("tail", "document"),
        "data.sampling": ("random", "sequential", "shuffled", "documents"),
        "data.documents": ("ignore", "packed"),
        "data.normalize": ("none", "NFC", "NFKC"),
    }
    for key, names in choices.items():
        if values[key] not in names:
            problems.append(f"{key} is {not_one_of(values[key], names)}")
    if config.data.mixture is not None:
        problems += _mixture_problems(config.data)
    if not 0 < config.data.val_fraction < 1:
        problems.append(f"data.val_fraction is {config.data.val_fraction}, but must be in (0, 1)")
    if not 0 < config.schedule.decay_fraction <= 1:
        fraction = config.schedule.decay_fraction
        problems.append(f"schedule.decay_fraction is {fraction}, but must be in (0, 1]")
    if not 0 <= config.optimizer.momentum < 1:
        momentum = config.optimizer.momentum
        problems.append(f"optimizer.momentum is {momentum}, but must be in [0, 1)")
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        problems.append(f"optimizer.betas is {config.optimizer.betas}, but both must be in [0, 1)")
    return problems


def _mixture_problems(data: DataConfig) -> list[str]:
    problems = []
    if data.path is not None:
        problems.append("data.path does nothing beside data.mixture: add it to the mixture")
    if not data.mixture:
        problems.append("data.mixture is empty, but needs at least one path with a weight")
    for path, weight in data.mixture.items():
        if not 0 < weight < math.inf:
            problems.append(f"data.mixture: the weight of {path} is {weight}, but must be above 0")
    return problems


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def overlay(config: Config, settings: Mapping[str, Any]) -> Config:
    """``config`` with the values of ``settings`` (``{"model.n_layer": 4}``) put in."""
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if section:
            part = dataclasses.replace(getattr(config, section), **{name: value})
            config = dataclasses.replace(config, **{section: part})
        else:
            config = dataclasses.replace(config, **{name: value})
    return config


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key, in the order of the dataclasses."""
    flat = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= {
                f"{item.name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)
            }
        else:
            flat[item.name] = value
    return flat
