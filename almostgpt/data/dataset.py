"""A prepared folder: the shards of both splits, the tokenizer and ``dataset.json``.

``dataset.json`` is written last: a folder that has one is complete. It holds the format version,
the source and options, and for every file its SHA-256; tokens and split for the shards.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from almostgpt.data.progress import progress_bar
from almostgpt.data.shards import HEADER_BYTES, Shard
from almostgpt.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from almostgpt.data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from almostgpt.errors import UserError
from almostgpt.files import expand, sha256_of

FILE_NAME = "dataset.json"
FORMAT = 1
SPLITS = ("train", "val")
BAR_FROM_BYTES = 1 << 30  # about a second of hashing


@dataclass(frozen=True)
class Dataset:
    """Tokens ready to train on."""

    folder: Path
    tokenizer: Tokenizer
    train: list[Shard]  # or integer arrays of shape (n,)
    val: list[Shard]
    fingerprint: str  # equal for equal text, tokenizer and options
    weights: ClassVar[None] = None  # a Mixture has some

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def train_tokens(self) -> int:
        """Tokens to train on."""
        return sum(len(shard) for shard in self.train)

    @property
    def val_tokens(self) -> int:
        """Tokens to validate on."""
        return sum(len(shard) for shard in self.val)


def is_prepared(folder: Path) -> bool:
    """Whether ``folder`` holds a prepared set, or bare ``.bin`` shards and no text."""
    return (folder / FILE_NAME).is_file() or (
        folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.rglob("*.txt"))
    )


def open_dataset(
    folder: str | Path, tokenizer: str | Tokenizer = "gpt2", *, progress: bool = True
) -> Dataset:
    """Opens a prepared folder and verifies it: every size, and every checksum (about 1 GB/s).

    A folder of bare public ``.bin`` files opens too: names with the word ``val`` validate, names with
    ``train`` train (``fineweb_train_000001.bin``), and ``tokenizer`` (or its name or folder) says what
    made them. A prepared folder brings its own.

    Raises ``UserError`` that names the file which is missing, damaged or foreign.
    """
    folder = expand(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of prepared data")
    if not (folder / FILE_NAME).is_file():
        return _open_bare(folder, tokenizer)
    manifest = _read_manifest(folder / FILE_NAME)
    entries = manifest["shards"]
    files = [folder / entry["file"] for entry in entries]
    try:
        shards = [Shard(file) for file in files]
    except UserError as error:
        raise UserError(f"{error}; delete {folder} and prepare the data again") from error
    for file, shard, entry in zip(files, shards, entries, strict=True):
        if len(shard) != entry["tokens"]:
            raise UserError(
                f"{file}: holds {len(shard)} tokens, but {FILE_NAME} says {entry['tokens']}; one "
                "of the two is damaged: delete the folder and prepare the data again"
            )
    total = sum(shard.nbytes + HEADER_BYTES for shard in shards)
    expected = {folder / TOKENIZER_FILE: manifest["tokenizer"]["sha256"]}
    expected |= {file: entry["sha256"] for file, entry in zip(files, entries, strict=True)}
    with progress_bar("verifying", total, progress and total > BAR_FROM_BYTES) as advance:
        for file, digest in expected.items():
            if not file.is_file() or sha256_of(file, advance) != digest:
                state = "its checksum differs" if file.is_file() else "it is missing"
                raise UserError(
                    f"{file}: damaged: {state}; delete {folder} and prepare the data again"
                )
    train, val = (
        [shard for shard, entry in zip(shards, entries, strict=True) if entry["split"] == split]
        for split in SPLITS
    )
    fingerprint = manifest["options"]["fingerprint"]
    return Dataset(folder, load_tokenizer(folder), train, val, fingerprint)


def _open_bare(folder: Path, tokenizer: str | Tokenizer) -> Dataset:
    """Public ``.bin`` files: they bring no checksums, so only their headers are checked."""
    files = sorted(folder.glob("*.bin"))
    words = {file: re.split(r"[^a-z]+", file.stem.lower()) for file in files}
    val = [file for file in files if not {"val", "valid", "validation"}.isdisjoint(words[file])]
    train = [file for file in files if "train" in words[file] and file not in val]
    if not train or not val:
        names = ", ".join(file.name for file in files[:5]) or "none"
        raise UserError(
            f"{folder}: not a prepared folder: it has no {FILE_NAME}, and no .bin files with both "
            f"'train' and 'val' in their names (found: {names})"
        )
    if tokenizer == CharTokenizer.name:
        raise UserError(
            f"{folder}: bare .bin files do not say which tokenizer made them, and char "
            "cannot have; set data.tokenizer (gpt2 for the public GPT-2 sets)"
        )
    opened = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    sizes = [[file.name, file.stat().st_size] for file in train + val]
    return Dataset(
        folder,
        opened,
        [Shard(file) for file in train],
        [Shard(file) for file in val],
        digest_of({"files": sizes, "tokenizer": [opened.name, opened.settings()]}),
    )


def _read_manifest(file: Path) -> dict[str, Any]:
    """``dataset.json`` with everything in place that is read from it."""
    try:
        manifest = json.loads(file.read_bytes())
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{file}: format {manifest['format']!r}, but this version reads {FORMAT}; prepare "
                "the data again"
            )
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        if manifest["sha256"] != digest_of(body):
            raise ValueError("its checksum differs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{file}: damaged: {reason}; delete the folder and prepare the data again"
        ) from error
    return manifest


def digest_of(settings: dict[str, Any]) -> str:
    """The SHA-256 of JSON values, in hexadecimal; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
