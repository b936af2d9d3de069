"""From a model and its tokenizer to a folder that transformers opens."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from almostgpt.data.tokenizer_base import Tokenizer
from almostgpt.errors import UserError
from almostgpt.files import expand, fsync_folder, temporary_beside, write_text
from almostgpt.hub.families import fitting_family
from almostgpt.hub.layout import Family
from almostgpt.hub.tokenizer_files import tokenizer_files
from almostgpt.hub.weights import INDEX, WHOLE
from almostgpt.model import GPT

SHARD_BYTES = 5 * 10**9  # transformers' own size of a file


def save_pretrained(
    model: GPT,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load; returns its model_type.

    The layout is the first of gpt2, llama, mistral, qwen2 and qwen3 that the model's parts fit. Biases
    that it has and the model has not are written as zeros; rows that pad the embedding are cut off.

    Args:
        folder: it must not exist; it appears when it is whole.
        tokenizer: None: none is written.
        shard_bytes: weights above that are split into files of at most so much, or one tensor.

    Raises:
        UserError: the folder exists, or no layout has the model's parts: they are named, with what they
            would have to be.
        OSError: it cannot be written; nothing is left of it then.
    """
    folder = expand(folder)
    family = fitting_family(model.config)
    files = {} if tokenizer is None else tokenizer_files(tokenizer)
    files |= _configs(family, model, tokenizer)
    if folder.exists():
        raise UserError(f"{folder}: already exists")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(folder)
    try:
        temporary.mkdir()
        for name, text in files.items():
            write_text(temporary / name, text)
        _write_weights(temporary, _tensors(family, model), shard_bytes)
        fsync_folder(temporary)
        os.rename(temporary, folder)
        fsync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return family.name


def _configs(family: Family, model: GPT, tokenizer: Tokenizer | None) -> dict[str, str]:
    config = family.completed(model.config)
    ends = list(tokenizer.stop_ids) if tokenizer is not None else []
    begin = tokenizer.begin[0] if tokenizer is not None and tokenizer.begin else None
    special = {
        "bos_token_id": begin,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": None,
    }
    values = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_weights,
        "initializer_range": 0.02,
        "use_cache": True,
        **special,
        **family.config(config),
    }
    return {
        "config.json": _json(values),
        "generation_config.json": _json({"_from_model_config": True, **special}),
    }


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _tensors(family: Family, model: GPT) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the family by their names, contiguous and in memory of their own."""
    state = model.state_dict()
    for ours, source in family.sources(family.completed(model.config)):
        total = sum(source.rows)
        if ours in state:
            value = state[ours][:total].cpu()  # rows past vocab_size are no tokens
        else:
            value = torch.zeros(total, dtype=model.dtype)
        for name, part in zip(source.names, value.split(source.rows), strict=True):
            yield (
                name,
                (part.T if source.transposed else part).clone(
                    memory_format=torch.contiguous_format
                ),
            )


def _write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """One file, or shards with an index. A shard is written as soon as it is full."""
    shards: list[tuple[Path, list[str]]] = []
    total, held = 0, {}

    def flush() -> None:
        path = folder / f"{len(shards)}.safetensors"
        _write(path, held)
        shards.append((path, list(held)))
        held.clear()

    for name, tensor in tensors:
        if held and tensor.nbytes + sum(t.nbytes for t in held.values()) > shard_bytes:
            flush()
        held[name] = tensor
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0][0].rename(folder / WHOLE)
        return
    index = {}
    for number, (path, names) in enumerate(shards, 1):  # how many there are is known only now
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / final)
        index |= dict.fromkeys(names, final)
    write_text(folder / INDEX, _json({"metadata": {"total_size": total}, "weight_map": index}))


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # wraps the operating system's errors in its own type
        raise OSError(f"{path}: {error}") from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
