"""Documents -> tokens -> a prepared folder; and the cache that makes it happen only once.

    survey   one pass over the text: how much there is, its hash, its alphabet
    encode   a second pass: the tokens of each split run into one spool file
    cut      the spools become shards of fixed size; dataset.json closes the folder

All of it happens in a temporary folder that takes its name when it is complete, so a killed run
leaves nothing that looks finished. The result depends on the text and the options alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from almostgpt.config import DataConfig
from almostgpt.data import dataset as prepared
from almostgpt.data.corpora import Document, read_documents
from almostgpt.data.dataset import Dataset, digest_of, is_prepared, open_dataset
from almostgpt.data.loader import document_start
from almostgpt.data.mixture import Mixture
from almostgpt.data.progress import progress_bar, say
from almostgpt.data.shards import MAX_TOKENS, write_shard
from almostgpt.data.survey import Survey, place, survey_documents
from almostgpt.data.tokenizer import (
    TOKENIZERS,
    CharTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
)
from almostgpt.errors import UserError
from almostgpt.files import (
    expand,
    fsync_folder,
    replacing,
    sha256_of,
    temporaries_beside,
    temporary_beside,
)


def cache_folder() -> Path:
    """``$ALMOSTGPT_CACHE``, by default ``~/.cache/almostgpt``. Not created here."""
    return expand(os.environ.get("ALMOSTGPT_CACHE") or "~/.cache/almostgpt")


def prepare(
    data: DataConfig, out: str | Path, *, cache: Path | None = None, progress: bool = True
) -> Dataset:
    """Prepares the text of ``data`` into the new folder ``out`` and opens it.

    ``cache`` (default :func:`~almostgpt.data.prepare.cache_folder`) keeps downloads; progress goes to
    stderr. Raises ``UserError`` for text that cannot be read or encoded, for a folder that is in
    use and for a full disk, and then leaves nothing behind.
    """
    if data.mixture is not None:
        raise UserError(
            "data.mixture is for training: prepare each set by itself, then mix them with "
            "almostgpt train --data.mixture"
        )
    out, cache = expand(out), cache or cache_folder()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; choose another folder or delete it first")
    survey = survey_documents(data, cache)
    tokenizer = build_tokenizer(data.tokenizer, [survey.alphabet])
    return _prepare(data, survey, tokenizer, out, cache, progress)


def cached_dataset(
    data: DataConfig,
    cache: Path | None = None,
    progress: bool = True,
    *,
    tokenizer: Tokenizer | None = None,
) -> Dataset | Mixture:
    """The data of a configuration, ready to train on; prepared in the cache the first time.

    A prepared folder in ``data.path`` is opened as it is, with its own tokenizer, and so is each of a
    ``data.mixture``. Otherwise the
    cache is keyed by the content of the text, the tokenizer and the split options.

    Args:
        tokenizer: of a model that is there already, which takes the place of ``data.tokenizer``.

    Raises:
        UserError: no data, or it is prepared with another tokenizer than the model's.
    """
    if data.mixture is not None:
        parts = [replace(data, path=path, mixture=None) for path in data.mixture]
        sets = [cached_dataset(part, cache, progress, tokenizer=tokenizer) for part in parts]
        return Mixture.of(sets, list(data.mixture.values()))
    if data.path is not None and is_prepared(expand(data.path)):
        dataset = open_dataset(data.path, tokenizer or data.tokenizer, progress=progress)
        if tokenizer is not None:
            _check_prepared_for(tokenizer, dataset)
        elif _names_another(data.tokenizer, dataset.tokenizer):
            own = dataset.tokenizer.name
            say(f"{data.path}: made with the {own} tokenizer, not {data.tokenizer}", progress)
        return dataset
    cache = cache or cache_folder()
    survey = survey_documents(data, cache)
    if tokenizer is None:
        tokenizer = build_tokenizer(data.tokenizer, [survey.alphabet])
    document_start(
        data.documents, tokenizer, data.sampling
    )  # refused now, rather than when all is prepared
    folder = cache / "datasets" / _options(data, survey, tokenizer)["fingerprint"][:32]
    if (folder / prepared.FILE_NAME).is_file():
        return open_dataset(folder, progress=progress)
    return _prepare(data, survey, tokenizer, folder, cache, progress)


def _names_another(name_or_folder: str, own: Tokenizer) -> bool:
    """Whether the user asks for another tokenizer than a prepared folder has (char: default)."""
    if name_or_folder in TOKENIZERS:
        return name_or_folder not in (CharTokenizer.name, own.name)
    return not load_tokenizer(name_or_folder).same_as(own)


def _check_prepared_for(models: Tokenizer, dataset: Dataset) -> None:
    theirs = dataset.tokenizer
    if theirs.same_as(models):
        return
    other = f"another {theirs.name}" if theirs.name == models.name else f"the {theirs.name}"
    raise UserError(
        f"{dataset.folder}: prepared with {other} tokenizer, but the model that training begins with "
        f"has the {models.name} one ({models.vocab_size} ids): its ids mean other text. Give the "
        "text itself as data.path"
    )


def _prepare(
    data: DataConfig, survey: Survey, tokenizer: Tokenizer, out: Path, cache: Path, progress: bool
) -> Dataset:
    if data.shard_tokens > MAX_TOKENS:
        raise UserError(f"data.shard_tokens is {data.shard_tokens}, but at most {MAX_TOKENS} fit")
    options = _options(data, survey, tokenizer)
    say(
        f"preparing {data.path or data.corpus}: {survey.documents:,} documents, "
        f"{survey.characters:,} characters, {tokenizer.name} tokenizer",
        progress,
    )
    if out.is_dir() and any(out.iterdir()) and not (out / prepared.FILE_NAME).is_file():
        raise UserError(
            f"{out}: incomplete: its {prepared.FILE_NAME} is missing; delete the folder and try again"
        )
    temporary = temporary_beside(out)
    try:
        temporary.mkdir(parents=True)
        with progress_bar("encoding", survey.characters, progress) as advance:
            spools = _encode(data, survey, tokenizer, temporary, cache, advance)
        shards = _cut(data, spools, tokenizer, temporary)
        for spool in spools.values():
            spool.unlink()
        _write_manifest(_source(data, survey), options, shards, tokenizer, temporary)
        os.rename(temporary, out)
        fsync_folder(out.parent)
    except OSError as error:
        if not (out / prepared.FILE_NAME).is_file():  # else another process was first
            raise UserError(
                f"{out}: the data could not be prepared: {error.strerror or error} "
                f"({error.filename or temporary}); nothing was left behind. Make room, or choose "
                "another folder (ALMOSTGPT_CACHE sets the cache)"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Now that the folder is there, others of its making are leftovers of killed processes, or the
    # work of slower ones, which will find the folder as this one would have.
    for leftover in temporaries_beside(out):
        shutil.rmtree(leftover, ignore_errors=True)
    dataset = open_dataset(out, progress=progress)
    if dataset.fingerprint != options["fingerprint"]:
        raise UserError(f"{out}: another process prepared other data here; choose another folder")
    say(
        f"prepared {out}: {dataset.train_tokens:,} tokens to train on, "
        f"{dataset.val_tokens:,} to validate, vocabulary {dataset.vocab_size:,}",
        progress,
    )
    return dataset


def _options(data: DataConfig, survey: Survey, tokenizer: Tokenizer) -> dict[str, Any]:
    """How a dataset is made; equal fingerprints mean byte-identical shards."""
    options = {
        "split": data.split,
        "val_fraction": data.val_fraction,
        "shard_tokens": data.shard_tokens,
        "content_sha256": survey.sha256,
    }
    vocabulary = {"kind": tokenizer.name, **tokenizer.settings()}
    return {
        **options,
        "fingerprint": digest_of({"format": prepared.FORMAT, **options, "tokenizer": vocabulary}),
    }


def _encode(
    data: DataConfig,
    survey: Survey,
    tokenizer: Tokenizer,
    folder: Path,
    cache: Path,
    advance: Callable[[int], object],
) -> dict[str, Path]:
    """Writes the tokens of each split to a spool file: raw ``tokenizer.dtype``, in document order.

    The end-of-text token stands between documents. Split by tail there is one spool, ``all``:
    where the tail begins is known at its end.
    """
    limit = survey.val_limit(data.val_fraction) if data.split == "document" else None
    splits = ["all"] if limit is None else list(prepared.SPLITS)
    spools = {split: folder / f"{split}.spool" for split in splits}
    separator = b""
    if tokenizer.end_of_text is not None:
        separator = np.array([tokenizer.end_of_text], tokenizer.dtype).tobytes()
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(spools[split], "wb")) for split in splits}
        for document in read_documents(data, cache):
            in_split = "all" if limit is None else ("train", "val")[place(document) < limit]
            file = files[in_split]
            if file.tell():
                file.write(separator)
            file.write(_tokens(document, tokenizer).tobytes())
            advance(len(document.text))
    return spools


def _tokens(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    begin = np.array(tokenizer.begin, tokenizer.dtype)
    try:
        return np.concatenate([begin, tokenizer.encode_array(document.text)])
    except UserError as error:
        raise UserError(f"{document.name}: {error}") from error


def _cut(
    data: DataConfig, spools: dict[str, Path], tokenizer: Tokenizer, folder: Path
) -> list[dict[str, Any]]:
    """Cuts the spools into shards and returns their entries for ``dataset.json``."""
    runs = {split: np.memmap(spool, tokenizer.dtype, "r") for split, spool in spools.items()}
    if "all" in runs:
        tokens = runs["all"]
        # As nanoGPT cuts it: the first int(n * 0.9) of n tokens train.
        tail = int(len(tokens) * (1 - data.val_fraction))
        runs = {"train": tokens[:tail], "val": tokens[tail:]}
    entries = []
    for split in prepared.SPLITS:
        for number, start in enumerate(range(0, len(runs[split]), data.shard_tokens)):
            tokens = runs[split][start : start + data.shard_tokens]
            file = f"{split}_{number:06d}.bin"
            digest = write_shard(folder / file, tokens)
            entries.append({"file": file, "split": split, "tokens": len(tokens), "sha256": digest})
    return entries


def _source(data: DataConfig, survey: Survey) -> dict[str, Any]:
    where = {"corpus": data.corpus} if data.path is None else {"path": data.path}
    return {**where, "documents": survey.documents, "characters": survey.characters}


def _write_manifest(
    source: dict[str, Any],
    options: dict[str, Any],
    shards: list[dict[str, Any]],
    tokenizer: Tokenizer,
    folder: Path,
) -> None:
    tokenizer_file = tokenizer.save(folder)
    manifest = {
        "format": prepared.FORMAT,
        "tokenizer": {
            "kind": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "sha256": sha256_of(tokenizer_file),
        },
        "source": source,
        "options": options,
        "tokens": {
            split: sum(entry["tokens"] for entry in shards if entry["split"] == split)
            for split in prepared.SPLITS
        },
        "shards": shards,
    }
    manifest["sha256"] = digest_of(manifest)
    with replacing(folder / prepared.FILE_NAME) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")
