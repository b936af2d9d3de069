"""Every setting of AlmostGPT: one tree of dataclasses, their derived values and their checks.

``config_file.py`` reads the tree from YAML and writes it back.

    load_config(name_or_file) -> Config -> resolve(config) -> Config with every derived value filled in
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from almostgpt.errors import UserError

MAX_SEED = 2**64 - 1  # of torch's generators
MAX_INT = 2**31 - 1  # of every other whole number: they count what must fit into a machine

# Settings that were switches once, and what false and true of an older file mean now.
FORMER_SWITCHES = {"model.gradient_checkpointing": ("none", "full")}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model and the part chosen for each of its swappable places."""

    block_size: int = 256  # longest sequence in tokens
    vocab_size: int | None = None  # number of token ids; null takes the tokenizer's
    vocab_multiple: int = 64  # rows of the embedding are rounded up to this (50257 -> 50304)
    n_layer: int = 6  # number of blocks
    n_head: int = 6  # number of query heads
    n_kv_head: int | None = None  # number of key/value heads (1: MQA); null is n_head (MHA)
    head_dim: int | None = None  # width of a head; null is n_embd / n_head
    n_embd: int = 384  # width of the residual stream
    mlp_ratio: float = 4.0  # hidden width of a plain feed-forward over n_embd (SwiGLU: 2/3 of it)
    mlp_hidden: int | None = None  # hidden width of the feed-forward; null: from mlp_ratio
    norm_eps: float = 1e-5  # added to the variance in norms
    rope_base: float = 10000.0  # base of the rotary frequencies
    dropout: float = 0.0  # after the embedding and after each sub-block
    bias: bool = False  # biases in linear layers and LayerNorm
    qkv_bias: bool | None = None  # bias of the QKV projection; null follows bias
    tie_weights: bool = True  # the output projection shares the token embedding
    gradient_checkpointing: str = "none"  # none | selective | full: less memory, more time
    norm: str = "rmsnorm"  # layernorm | rmsnorm
    feedforward: str = "swiglu"  # gelu | gelu_tanh | relu2 | swiglu
    position: str = "rope"  # learned | sinusoidal | rope
    attention: str = "full"  # full
    quantize: str = "none"  # none | int8: matrices in 8 bits, for inference alone

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding: ``vocab_size`` rounded up to ``vocab_multiple``."""
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not set: give the number of token ids")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes windows of tokens."""

    path: str | None = None  # a .txt file, a folder of text, or a prepared folder; wins over corpus
    corpus: str = "stdlib"  # stdlib | shakespeare
    tokenizer: str = "char"  # char | byte | gpt2, or a folder with a saved tokenizer
    split: str = "tail"  # tail: the last part of the text validates; document: whole documents do
    val_fraction: float = 0.1  # share of the text (or of the documents) kept for validation
    sampling: str = "random"  # random | sequential windows
    documents: str = "ignore"  # packed: no token attends to another document | ignore: it may
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
    seed: int = 1337  # of weights, batches and dropout
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps


# ---------------------------------------------------------------- derived values and checks


def resolve_model(model: GPTConfig) -> GPTConfig:
    """Fills the derived sizes of a model. Pure; a resolved configuration resolves to itself."""
    plain_hidden = model.mlp_ratio * model.n_embd
    if model.feedforward == "swiglu":
        # Three matrices instead of two: 2/3 of the width keeps the parameters (Shazeer 2020),
        # rounded up to 32 so that every GEMM stays aligned.
        derived_hidden = -(-int(plain_hidden * 2 / 3) // 32) * 32
    else:
        derived_hidden = int(plain_hidden)
    return dataclasses.replace(
        model,
        n_kv_head=model.n_head if model.n_kv_head is None else model.n_kv_head,
        head_dim=model.n_embd // max(model.n_head, 1) if model.head_dim is None else model.head_dim,
        mlp_hidden=derived_hidden if model.mlp_hidden is None else model.mlp_hidden,
        qkv_bias=model.bias if model.qkv_bias is None else model.qkv_bias,
    )


def resolve(config: Config) -> Config:
    """Fills every derived value and checks the whole tree; raises one ``UserError`` for all problems.

    ``model.vocab_size`` stays ``None`` until the tokenizer is known. Pure: reads nothing but its
    argument, so that a stored configuration means the same on every machine.
    """
    problems = config_problems(config)
    if problems:
        raise UserError("the configuration cannot work:\n" + "\n".join(f"  {p}" for p in problems))
    schedule = dataclasses.replace(
        config.schedule,
        decay_steps=_first(config.schedule.decay_steps, config.training.steps),
        min_lr=_first(config.schedule.min_lr, config.optimizer.lr / 10),
    )
    return dataclasses.replace(config, model=resolve_model(config.model), schedule=schedule)


def model_problems(model: GPTConfig) -> list[str]:
    """What is impossible about the sizes of a model, each as ``model.key: reason``."""
    at_least_one = "block_size vocab_multiple n_layer n_head n_embd".split()
    if_given = "vocab_size n_kv_head head_dim mlp_hidden".split()
    problems = [
        f"model.{name} is {getattr(model, name)}, but must be at least 1"
        for name in [*at_least_one, *if_given]
        if getattr(model, name) is not None and getattr(model, name) < 1
    ]
    for name in ("mlp_ratio", "norm_eps", "rope_base"):
        if not 0 < getattr(model, name) < math.inf:
            problems.append(
                f"model.{name} is {getattr(model, name)}, but must be above 0 and finite"
            )
    if problems:
        return problems
    if model.head_dim is None and model.n_embd % model.n_head:
        problems.append(
            f"model.n_embd ({model.n_embd}) is not a multiple of model.n_head ({model.n_head}); "
            "change one of them or set model.head_dim"
        )
    if model.n_kv_head is not None and model.n_head % model.n_kv_head:
        problems.append(
            f"model.n_head ({model.n_head}) is not a multiple of model.n_kv_head ({model.n_kv_head})"
        )
    head_dim = resolve_model(model).head_dim
    if model.position == "rope" and head_dim % 2:
        problems.append(f"model.head_dim is {head_dim}, but model.position=rope needs an even one")
    if model.position == "sinusoidal" and model.n_embd % 2:
        problems.append(
            f"model.n_embd is {model.n_embd}, but model.position=sinusoidal needs an even one"
        )
    choices = {
        "gradient_checkpointing": ("none", "selective", "full"),
        "quantize": ("none", "int8"),
    }
    for key, known in choices.items():
        if (value := getattr(model, key)) not in known:
            problems.append(f"model.{key} is {not_one_of(value, known)}")
    if not 0 <= model.dropout < 1:
        problems.append(f"model.dropout is {model.dropout}, but must be in [0, 1)")
    return problems


def config_problems(config: Config) -> list[str]:
    """What is impossible about a configuration, each as ``section.key: reason``."""
    values = flatten(config)
    for key, value in values.items():
        limit = MAX_SEED if key == "seed" else MAX_INT
        if isinstance(value, int) and value > limit:
            return [f"{key} is {value}, but must be at most {limit}"]
    problems = model_problems(config.model)
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
        "data.sampling": ("random", "sequential"),
        "data.documents": ("ignore", "packed"),
    }
    for key, names in choices.items():
        if values[key] not in names:
            problems.append(f"{key} is {not_one_of(values[key], names)}")
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


def not_one_of(name: object, known: Iterable[str]) -> str:
    """``'layernrm', which is not one of layernorm, rmsnorm; did you mean layernorm?``"""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"{name!r}, which is not one of {', '.join(known)}" + (
        f"; did you mean {near[0]}?" if near else ""
    )


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
