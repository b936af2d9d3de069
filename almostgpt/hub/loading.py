"""From a Hugging Face folder, or hub id, to a model and its tokenizer."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor

from almostgpt.config import GPTConfig, model_problems, resolve_model
from almostgpt.data.huggingface import HuggingFaceTokenizer, read_json
from almostgpt.data.tokenizer_base import Tokenizer
from almostgpt.errors import UserError
from almostgpt.hub.download import folder_of
from almostgpt.hub.families import family_of, given_settings
from almostgpt.hub.layout import Family, Given, Source, refused
from almostgpt.hub.weights import DTYPES, StoredTensors
from almostgpt.model import GPT

HEAD = "lm_head.weight"  # of every family
SHOWN = 8  # problems of weights that are written out; there can be one for every tensor


def load_pretrained(
    id_or_folder: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    block_size: int | None = None,
) -> tuple[GPT, Tokenizer]:
    """A model of Hugging Face, in evaluation mode, and its tokenizer.

    ::

        model, tokenizer = load_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")

    Args:
        id_or_folder: a folder in Hugging Face's format, or an id of the hub, which is downloaded once.
        revision: of a hub id: a branch, tag or commit; None: the newest.
        dtype: of the parameters, whatever it was in the files.
        block_size: a shorter one than the model has; None: its own.

    Raises:
        UserError: neither folder nor id, no network, files that are missing or damaged, or a model
            that cannot be expressed here, with every reason.
    """
    folder = folder_of(id_or_folder, revision)
    tokenizer = HuggingFaceTokenizer.from_folder(folder)  # at once: it is read in a moment
    model = load_model(folder, dtype=dtype, block_size=block_size)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, but the model only "
            f"{model.config.vocab_size}"
        )
    return model, tokenizer


def load_model(
    id_or_folder: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    block_size: int | None = None,
) -> GPT:
    """The model alone; see :func:`load_pretrained`."""
    folder = folder_of(id_or_folder, revision)
    family, config = read_config(folder)
    stored = StoredTensors(folder)
    config, sources = _as_stored(family, config, stored)
    _check(family, config, sources, stored)
    model = GPT(_shortened(config, block_size)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = _assembled(sources[name], family, stored)
            parameter.copy_(value[: len(parameter)])  # fewer learned positions, or all of it
    return model


def read_config(folder: Path) -> tuple[Family, GPTConfig]:
    """The family and our settings of a folder's ``config.json``; ``UserError`` with every reason."""
    file = folder / "config.json"
    values = read_json(file)
    family, given = family_of(values, str(file)), Given(values)
    config = GPTConfig(**given_settings(family, given))
    problems = given.problems or [p.removeprefix("model.") for p in model_problems(config)]
    if problems:
        raise refused(f"{file}: this model cannot be expressed here", problems)
    return family, resolve_model(config)


def _shortened(config: GPTConfig, block_size: int | None) -> GPTConfig:
    """The model for shorter texts; a window that would hold them whole goes."""
    if block_size is None or block_size == config.block_size:
        return config
    if not 1 <= block_size <= config.block_size:
        raise UserError(f"block_size is {block_size}, but the model's own is {config.block_size}")
    config = dataclasses.replace(config, block_size=block_size)
    if config.attention == "sliding_window" and config.attention_window >= block_size:
        return dataclasses.replace(
            config, attention="full", attention_window=None, window_pattern=None
        )
    return config


def _as_stored(
    family: Family, config: GPTConfig, stored: StoredTensors
) -> tuple[GPTConfig, dict[str, Source]]:
    """The model, and where its parameters lie, once the files have been looked at.

    The matrix of a tied head may be stored by either of its names, or by both; where these two differ,
    the head is not tied, whatever ``config.json`` says. transformers has both alike
    (``PreTrainedModel.tie_weights``).
    """
    if config.n_layer > len(stored.names()):
        raise UserError(
            f"{stored.folder}: config.json has {config.n_layer} layers, but the files only "
            f"{len(stored.names())} tensors"
        )
    sources = dict(family.sources(config))
    present = set(stored.names())
    if not config.tie_weights or HEAD not in present:
        return config, sources
    embedding = sources["token_embedding.weight"]
    name = _stored_name(embedding.names[0], family, present)
    if name not in present:
        return config, {**sources, "token_embedding.weight": embedding._replace(names=(HEAD,))}
    if stored.equal(name, HEAD):
        return config, sources
    config = dataclasses.replace(config, tie_weights=False)
    return config, dict(family.sources(config))


def _check(
    family: Family, config: GPTConfig, sources: dict[str, Source], stored: StoredTensors
) -> None:
    """Whether the files have the model's tensors, all of them and no others, in the right shapes."""
    try:
        shapes = _shapes(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # more than 64 bits can count
        raise UserError(
            f"{stored.folder / 'config.json'}: damaged: its sizes are beyond any tensor's"
        ) from error
    present = set(stored.names())
    problems, known = [], set()
    for ours, source in sources.items():
        for name, rows in zip(source.names, source.rows, strict=True):
            name = _stored_name(name, family, present)
            known.add(name)
            shape = (rows, *shapes[ours][1:])
            shape = shape[::-1] if source.transposed else shape
            if name not in present:
                problems.append(f"{name} is missing")
            elif stored.shape(name) != shape:
                problems.append(f"{name} has the shape {stored.shape(name)}, not {shape}")
            elif stored.dtype(name) not in DTYPES:
                problems.append(f"{name} is of {stored.dtype(name)}, not of {', '.join(DTYPES)}")
    tied = {HEAD} if config.tie_weights else set()  # the embedding once more
    problems += [
        f"{name} is unknown"
        for name in sorted(present - known - tied)
        if not re.search(family.left_out, name)
    ]
    if problems:
        more = len(problems) - SHOWN
        shown = problems[:SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise refused(f"{stored.folder}: the weights are not those of its config.json", shown)


def _shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter, without any memory for them."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}


def _stored_name(name: str, family: Family, present: set[str]) -> str:
    """The name in the files: those of a model without its head lack the prefix (GPT-2's on the hub)."""
    short = name.removeprefix(family.prefix)
    return short if name not in present and short in present else name


def _assembled(source: Source, family: Family, stored: StoredTensors) -> Tensor:
    """A parameter in our shape."""
    present = set(stored.names())
    parts = [stored.read(_stored_name(name, family, present)) for name in source.names]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.T if source.transposed else whole
