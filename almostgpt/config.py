"""Every setting of AlmostGPT: one tree of dataclasses, read from YAML files that are checked strictly.

A configuration file names only what differs from the defaults below, or from the file that its
``base:`` names (a built-in preset or a path). Values are coerced by the annotated type of the field
(so ``1e-3`` is a float, which plain YAML reads as a string); whatever does not fit is reported with
its file, its key and the nearest known name, all problems in one message.

    load_config(name_or_file) -> Config -> resolve(config) -> Config with every derived value filled in
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from almostgpt.errors import UserError

PRESETS = Path(__file__).parent / "configs"


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
    mlp_hidden: int | None = (
        None  # hidden width of the feed-forward; null derives it from mlp_ratio
    )
    norm_eps: float = 1e-5  # added to the variance in norms
    rope_base: float = 10000.0  # base of the rotary frequencies
    dropout: float = 0.0  # after the embedding and after each sub-block
    bias: bool = False  # biases in linear layers and LayerNorm
    qkv_bias: bool | None = None  # bias of the QKV projection; null follows bias
    tie_weights: bool = True  # the output projection shares the token embedding
    gradient_checkpointing: bool = False  # recompute each block in backward: less memory, more time
    norm: str = "rmsnorm"  # layernorm | rmsnorm
    feedforward: str = "swiglu"  # gelu | gelu_tanh | swiglu
    position: str = "rope"  # learned | sinusoidal | rope
    attention: str = "full"  # full

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
    shard_tokens: int = 100_000_000  # tokens in one shard file


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; weight decay touches matrices only."""

    lr: float = 1e-3  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the first and second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled, on parameters with two or more dimensions
    clip: float = 1.0  # largest global gradient norm; 0 switches clipping off


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the steps: linear warm-up, then the named decay."""

    name: str = "cosine"  # cosine | constant
    warmup_steps: int = 100  # steps from 0 to the peak
    decay_steps: int | None = None  # step at which min_lr is reached; null is training.steps
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
    if not 0 <= model.dropout < 1:
        problems.append(f"model.dropout is {model.dropout}, but must be in [0, 1)")
    for name in ("mlp_ratio", "norm_eps", "rope_base"):
        if not getattr(model, name) > 0:
            problems.append(f"model.{name} is {getattr(model, name)}, but must be above 0")
    return problems


def config_problems(config: Config) -> list[str]:
    """What is impossible about a configuration, each as ``section.key: reason``."""
    problems = model_problems(config.model)
    values = flatten(config)
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
        "schedule.name": ("cosine", "constant"),
        "data.split": ("tail", "document"),
        "data.sampling": ("random", "sequential"),
    }
    for key, names in choices.items():
        if values[key] not in names:
            problems.append(f"{key} is {not_one_of(values[key], names)}")
    if not 0 < config.data.val_fraction < 1:
        problems.append(f"data.val_fraction is {config.data.val_fraction}, but must be in (0, 1)")
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        problems.append(f"optimizer.betas is {config.optimizer.betas}, but both must be in [0, 1)")
    return problems


def not_one_of(name: object, known: typing.Iterable[str]) -> str:
    """``'layernrm', which is not one of layernorm, rmsnorm; did you mean layernorm?``"""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"{name!r}, which is not one of {', '.join(known)}" + (
        f"; did you mean {near[0]}?" if near else ""
    )


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


# ---------------------------------------------------------------- reading and writing YAML


def load_config(name_or_file: str | Path) -> Config:
    """The defaults, overlaid with a preset (by name) or a YAML file and the files it is based on."""
    return overlay(Config(), read_settings(name_or_file))


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


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that :func:`load_config` reads back to an equal one."""
    tree = dataclasses.asdict(config)
    tree["optimizer"]["betas"] = list(tree["optimizer"]["betas"])
    return yaml.safe_dump(tree, sort_keys=False)


def find_config(name_or_file: str | Path, relative_to: Path | None = None) -> Path:
    """The YAML file that a preset's name or a path means."""
    given = Path(name_or_file)
    candidates = [given, *([relative_to / given] if relative_to else [])]
    for candidate in candidates:
        if candidate.suffix in {".yaml", ".yml"} and candidate.is_file():
            return candidate
    preset = PRESETS / f"{given}.yaml"
    if len(given.parts) == 1 and preset.is_file():
        return preset
    raise UserError(
        f"no configuration named {str(name_or_file)!r}: neither a .yaml file nor a preset. Presets: "
        + ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        + _near_hint(str(name_or_file), [p.stem for p in PRESETS.glob("*.yaml")])
    )


def read_settings(name_or_file: str | Path) -> dict[str, Any]:
    """The settings that a file and its chain of bases give, as ``{"model.n_layer": 4}``, coerced."""
    problems: list[str] = []
    settings: dict[str, Any] = {}
    for file, tree in reversed(list(_base_chain(name_or_file))):
        settings |= _read_tree(tree, file, problems)
    if problems:
        raise UserError("\n".join(problems))
    return settings


def _base_chain(name_or_file: str | Path) -> Iterator[tuple[Path, dict]]:
    """Yields the file, then its base, then the base's base."""
    seen: list[Path] = []
    file: Path | None = find_config(name_or_file)
    while file is not None:
        if file.resolve() in seen:
            raise UserError(f"{file}: base: the files are based on each other in a circle")
        seen.append(file.resolve())
        try:
            tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not readable as YAML: {error}") from error
        tree = {} if tree is None else tree
        if not isinstance(tree, dict):
            raise UserError(
                f"{file}: expected 'section: {{key: value}}', found {type(tree).__name__}"
            )
        base = tree.pop("base", None)
        yield file, tree
        file = None if base is None else find_config(base, relative_to=file.parent)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a setting given twice is a mistake."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _read_tree(tree: dict, file: Path, problems: list[str]) -> dict[str, Any]:
    """One file's settings, coerced; what does not fit is added to ``problems``."""
    settings: dict[str, Any] = {}
    top = typing.get_type_hints(Config)
    for key, value in tree.items():
        if key not in top:
            known = [*top, *(f"{s}.{n}" for s in top for n in _section_hints(top[s]))]
            problems.append(f"{file}: {key}: unknown key{_near_hint(str(key), known)}")
        elif not dataclasses.is_dataclass(top[key]):
            _coerce_into(settings, key, value, top[key], file, problems)
        elif not isinstance(value, dict):
            problems.append(f"{file}: {key}: a section, so it needs 'key: value' lines below it")
        else:
            hints = _section_hints(top[key])
            for name, leaf in value.items():
                if name in hints:
                    _coerce_into(settings, f"{key}.{name}", leaf, hints[name], file, problems)
                else:
                    hint = _near_hint(str(name), hints)
                    problems.append(f"{file}: {key}.{name}: unknown key{hint}")
    return settings


def _section_hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}


def _near_hint(name: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if not near:  # a key written without its section, or with another one
        near = [k for k in known if k.rpartition(".")[2] == name][:1]
    return f"; did you mean {near[0]}?" if near else ""


def _coerce_into(
    out: dict, key: str, value: Any, kind: Any, file: Path, problems: list[str]
) -> None:
    try:
        out[key] = coerce(value, kind)
    except ValueError as error:
        problems.append(f"{file}: {key}: {error}")


def coerce(value: Any, kind: Any) -> Any:
    """``value`` as the annotated type ``kind``; ``ValueError`` says what was expected.

    >>> coerce("1e-3", float)
    0.001
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return coerce(value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(args):
            raise ValueError(f"expected a list of {len(args)} values, found {value!r}")
        return tuple(coerce(v, a) for v, a in zip(value, args, strict=True))
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if (
        kind in (int, float)
        and isinstance(value, (int, float, str))
        and not isinstance(value, bool)
    ):
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if kind is float and number == number:
            return number
        if kind is int and number == number and number.is_integer():
            return int(value) if isinstance(value, int) else int(number)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise ValueError(f"expected {names[kind]}, found {value!r}")
