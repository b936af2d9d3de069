"""Fine-tuning: a new run whose first weights are those of a model that is there already (``init``).

The shape of the model is that of its weights; what shapes no weight (dropout, windows, the length of
the text) may be set anew. So may everything that is not the model's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from almostgpt import checkpoint
from almostgpt.config import Config, GPTConfig, model_problems, overlay, resolve, resolve_model
from almostgpt.config_file import load_config
from almostgpt.config_model import without_unused
from almostgpt.data.tokenizer import TOKENIZERS, Tokenizer, load_tokenizer
from almostgpt.errors import UserError
from almostgpt.model import GPT
from almostgpt.model.gpt import PARTS

# They shape a model that is made anew. Of one that is there, the weights and the tokenizer say it.
DECIDED = ("vocab_size", "vocab_multiple", "mlp_ratio", "quantize")

TABLE = "position.weight"  # learned positions: (block_size, n_embd)


@dataclass(frozen=True)
class Initial:
    """What training begins with."""

    folder: Path  # of the checkpoint, or exported: absolute
    model: GPTConfig  # resolved, with its vocabulary
    tokenizer: Tokenizer


def read_initial(run_or_checkpoint: str | Path) -> Initial:
    """The shape and the tokenizer of a run (its newest whole checkpoint), checkpoint or exported folder.

    Raises:
        UserError: nothing there, damaged, or quantised.
    """
    folder = checkpoint.find(run_or_checkpoint).absolute()
    model = resolve(load_config(folder / checkpoint.CONFIG)).model
    if model.quantize != "none":
        raise UserError(
            f"--init {folder}: its weights are quantised ({model.quantize}), and such cannot be "
            "trained: begin with the model that it was made of"
        )
    return Initial(folder, model, load_tokenizer(folder / checkpoint.TOKENIZER))


def settings_beside(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Of a file's settings those that count where a run begins with weights that are there.

    A built-in preset describes a model of its own; that one is not made. So its ``model`` section and
    tokenizer are left out, and those of the user's ``own`` files stay: they are asked for.
    """
    return {
        key: value
        for key, value in settings.items()
        if key in own or not (key.startswith("model.") or key == "data.tokenizer")
    }


def defaults_from(initial: Initial, config: Config) -> Config:
    """``config`` with the model and the tokenizer of ``initial``, before anything else is asked for."""
    return overlay(config, {"model": initial.model, "data.tokenizer": initial.tokenizer.name})


def begin_with(initial: Initial, config: Config) -> Config:
    """``config``, which asks for changes of the model, as settings that the weights serve.

    ``config.init`` becomes the checkpoint's own folder, so that a run that goes on means the same one.

    Raises:
        UserError: all that the weights or the tokenizer contradict, in one message.
    """
    asked = {
        item.name: value
        for item in dataclasses.fields(GPTConfig)
        # null asks for what follows from the rest, and that the weights have decided.
        if (value := getattr(config.model, item.name))
        not in (None, getattr(initial.model, item.name))
    }
    problems = [
        f"model.{name}: the weights have {getattr(initial.model, name)!r}, now {value!r} is asked for"
        for name, value in asked.items()
        if name in DECIDED or not _shape_stays(initial.model, {name: value})
    ]
    problems += _tokenizer_problems(initial, config.data.tokenizer)
    if problems:
        raise UserError(
            f"--init {initial.folder}: training begins with these weights, and what is asked for does "
            "not fit them:\n" + "\n".join(f"  {problem}" for problem in problems) + "\nLeave these "
            "settings out, or leave --init out and train a new model."
        )
    model = _changed(initial.model, asked)
    return overlay(config, {"model": model, "init": str(initial.folder)})


def _changed(model: GPTConfig, asked: Mapping[str, Any]) -> GPTConfig:
    """Options that belonged to a part which is exchanged go with it, unless they are asked for."""
    changed = without_unused(dataclasses.replace(model, **asked))
    return dataclasses.replace(changed, **asked)


def _shape_stays(model: GPTConfig, asked: Mapping[str, Any]) -> bool:
    """Whether the weights of ``model`` are those of the model that is asked for, too."""
    changed = resolve_model(_changed(model, asked))
    if model_problems(changed, PARTS):
        return True  # it cannot be, whatever the weights: that is said with everything of this kind
    before, after = _shapes(model), _shapes(changed)
    if TABLE in before and TABLE in after and after[TABLE] <= before[TABLE]:
        after[TABLE] = before[TABLE]  # its first rows are taken
    return before == after


def _shapes(model: GPTConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in GPT(model).state_dict().items()}


def _tokenizer_problems(initial: Initial, asked: str) -> list[str]:
    own = initial.tokenizer
    if asked == own.name:
        return []
    if asked in TOKENIZERS or not load_tokenizer(asked).same_as(own):
        return [
            f"data.tokenizer: the model was trained with {own.name} ({own.vocab_size} ids), now "
            f"{asked!r} is asked for: every id would mean another text"
        ]
    return []


def load_initial_weights(model: GPT, run_or_checkpoint: str | Path) -> None:
    """Copies the weights into a new model. Of learned positions the first ``block_size`` are taken.

    Raises:
        UserError: nothing there, damaged, or not of this shape.
    """
    folder = checkpoint.find(run_or_checkpoint)
    weights = load_file(folder / checkpoint.MODEL)
    if model.config.position == "learned" and TABLE in weights:
        weights[TABLE] = weights[TABLE][: model.config.block_size].clone()
    checkpoint.load_weights(model, weights, folder)


def remark(initial: Initial, config: Config) -> str:
    """For people: what a run begins with."""
    before, now = initial.model.block_size, config.model.block_size
    cut = config.model.position == "learned" and now < before
    return f"beginning with the weights of {initial.folder}" + (
        f"; of its {before} learned positions the first {now} are taken" if cut else ""
    )
