"""``dataset.json``: what a prepared folder says about itself, written when all else is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from almostgpt.config import DataConfig
from almostgpt.data import dataset as prepared
from almostgpt.data.corpora import Source
from almostgpt.data.dataset import digest_of
from almostgpt.data.survey import Survey
from almostgpt.data.tokenizer import Tokenizer
from almostgpt.files import replacing, sha256_of


def options(data: DataConfig, survey: Survey, tokenizer: Tokenizer) -> dict[str, Any]:
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


def source_entry(data: DataConfig, source: Source, survey: Survey) -> dict[str, Any]:
    """Where the text was, how it was read, and how much of it there is."""
    where = {"corpus": data.corpus} if data.path is None else {"path": data.path}
    return {
        **where,
        "kind": source.kind,
        "column": data.column,
        "min_length": data.min_length,
        "deduplicate": data.deduplicate,
        "normalize": data.normalize,
        "documents": survey.documents,
        "characters": survey.characters,
    }


def write_manifest(
    source: dict[str, Any],
    options: dict[str, Any],
    dropped: dict[str, int],
    shards: list[dict[str, Any]],
    tokenizer: Tokenizer,
    folder: Path,
) -> None:
    """Saves the tokenizer and writes ``dataset.json``; ``shards``: file, split, tokens, sha256 of each."""
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
        "dropped": dropped,
        "tokens": {
            split: sum(entry["tokens"] for entry in shards if entry["split"] == split)
            for split in prepared.SPLITS
        },
        "shards": shards,
    }
    manifest["sha256"] = digest_of(manifest)
    with replacing(folder / prepared.FILE_NAME) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def dropped_from(folder: Path) -> dict[str, int]:
    """How many documents a prepared folder left out, by the reason; older folders do not say."""
    return json.loads((folder / prepared.FILE_NAME).read_bytes()).get("dropped", {})
