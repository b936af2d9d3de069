"""Blocks of text to a piece of tokens: the work that many processes share.

A piece depends on its blocks and on the task alone, so it does not matter which process makes it.
Blocks and pieces travel between processes as a JSON object and a run of bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from almostgpt.data.corpora import CORPORA, Block, Document, documents_of
from almostgpt.data.corpora.base import BLOCK_BYTES
from almostgpt.data.filters import KEYS, kept_documents, key_of
from almostgpt.data.tokenizer import Tokenizer
from almostgpt.errors import UserError

DIGEST_BYTES = 32
MOST_BLOCKS = 1024  # in a batch, however small they are


@dataclass(frozen=True)
class Task:
    """What is to be done to blocks."""

    corpus: str  # a key of CORPORA
    column: str | None
    min_length: int
    normalize: str
    deduplicate: bool  # keys are wanted
    alphabet: bool  # the characters that occur are wanted


@dataclass
class Piece:
    """What became of some blocks: n documents that are kept so far."""

    digests: np.ndarray  # (n, 32) uint8: of name and text
    keys: np.ndarray  # (n,) S16: of the text; empty if they are not wanted
    characters: np.ndarray  # (n,) int64
    lengths: np.ndarray  # (n,) int64: tokens, with the separator before and what a text begins with
    tokens: np.ndarray  # (lengths.sum(),) of the tokenizer's dtype
    dropped: dict[str, int]  # documents by the reason
    alphabet: str = ""


def make_piece(task: Task, tokenizer: Tokenizer | None, blocks: Sequence[Block]) -> Piece:
    """Parses, cleans, filters and encodes. Without a tokenizer there are no tokens.

    Raises ``UserError`` that names file and row.
    """
    corpus, dropped = CORPORA[task.corpus], Counter()
    digests, keys, characters, tokens = [], [], [], []
    alphabet: set[str] = set()
    for block in blocks:
        documents = documents_of(block, corpus, task.column)
        for document in kept_documents(documents, task.normalize, task.min_length, dropped):
            content = document.text.encode()
            digests.append(digest_of_document(document.name, content))
            if task.deduplicate:
                keys.append(key_of(content))
            characters.append(len(document.text))
            if task.alphabet:
                alphabet.update(document.text)
            if tokenizer is not None:
                tokens.append(_encode(document, tokenizer))
    dtype = np.uint16 if tokenizer is None else tokenizer.dtype
    return Piece(
        np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES),
        np.frombuffer(b"".join(keys), KEYS),
        np.array(characters, np.int64),
        np.array([len(run) for run in tokens], np.int64),
        np.concatenate(tokens) if tokens else np.zeros(0, dtype),
        dict(dropped),
        "".join(sorted(alphabet)),
    )


def _encode(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    before = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    before = np.array([*before, *tokenizer.begin], tokenizer.dtype)
    try:
        return np.concatenate([before, tokenizer.encode_array(document.text)])
    except UserError as error:
        raise UserError(f"{document.where}: {error}") from error


def digest_of_document(name: str, content: bytes) -> bytes:
    """The SHA-256 of a document's name and text (UTF-8)."""
    # The length keeps ("ab", "c") and ("a", "bc") apart; names may hold bytes that are not UTF-8.
    encoded = name.encode("utf-8", "surrogateescape")
    return hashlib.sha256(len(encoded).to_bytes(8, "little") + encoded + content).digest()


# ---------------------------------------------------------------- batches of blocks


@dataclass(frozen=True)
class Batch:
    """Blocks that are worked on together: small files would not be worth the way one by one."""

    blocks: list[Block]

    @property
    def size(self) -> int:
        """Bytes of the source."""
        return sum(block.size for block in self.blocks)

    @property
    def weight(self) -> int:
        """Bytes in memory."""
        return sum(len(block.content) for block in self.blocks)

    def chained(self, before: bytes) -> bytes:
        """A hash of this batch and of all ``before`` it."""
        digest = hashlib.sha256(before)
        for block in self.blocks:
            digest.update(json.dumps([block.name, block.first, len(block.content)]).encode())
            digest.update(block.content)
        return digest.digest()


def in_batches(blocks: Iterable[Block]) -> Iterator[Batch]:
    """Consecutive blocks of about a megabyte together; the same ones for any number of workers."""
    waiting: list[Block] = []
    weight = 0
    for block in blocks:
        waiting.append(block)
        weight += len(block.content)
        if weight >= BLOCK_BYTES or len(waiting) == MOST_BLOCKS:
            yield Batch(waiting)
            waiting, weight = [], 0
    if waiting:
        yield Batch(waiting)


# ---------------------------------------------------------------- messages


def send(file: BinaryIO, header: dict[str, Any], *buffers: bytes | np.ndarray) -> None:
    """One message: a JSON object and any number of buffers."""
    views = [memoryview(buffer).cast("B") if len(buffer) else memoryview(b"") for buffer in buffers]
    encoded = json.dumps({**header, "sizes": [len(view) for view in views]}).encode()
    file.write(struct.pack("<Q", len(encoded)))
    file.write(encoded)
    for view in views:
        file.write(view)
    file.flush()


def receive(file: BinaryIO) -> tuple[dict[str, Any], list[bytes]] | None:
    """The next message, or None where the other side has gone."""
    length = file.read(8)
    if len(length) < 8:
        return None
    size = struct.unpack("<Q", length)[0]
    encoded = file.read(size)
    if len(encoded) < size:  # it went in the middle of a message
        return None
    header = json.loads(encoded)
    buffers = [file.read(size) for size in header["sizes"]]
    if any(len(b) < size for b, size in zip(buffers, header["sizes"], strict=True)):
        return None
    return header, buffers


def send_blocks(file: BinaryIO, blocks: Sequence[Block]) -> None:
    fields = [[b.file, b.name, b.first, b.unit] for b in blocks]
    send(file, {"blocks": fields}, *(block.content for block in blocks))


def received_blocks(header: dict[str, Any], buffers: list[bytes]) -> list[Block]:
    return [
        Block(file, name, content, first, unit)
        for (file, name, first, unit), content in zip(header["blocks"], buffers, strict=True)
    ]


def send_piece(file: BinaryIO, piece: Piece) -> None:
    arrays = (piece.digests, piece.keys, piece.characters, piece.lengths, piece.tokens)
    kinds = [array.dtype.str for array in arrays]
    header = {"dtypes": kinds, "dropped": piece.dropped, "alphabet": piece.alphabet}
    send(file, header, *(np.ascontiguousarray(array).view(np.uint8) for array in arrays))


def received_piece(header: dict[str, Any], buffers: list[bytes]) -> Piece:
    digests, keys, characters, lengths, tokens = (
        np.frombuffer(buffer, dtype)
        for buffer, dtype in zip(buffers, header["dtypes"], strict=True)
    )
    return Piece(
        digests.reshape(-1, DIGEST_BYTES),
        keys,
        characters,
        lengths,
        tokens,
        header["dropped"],
        header["alphabet"],
    )
