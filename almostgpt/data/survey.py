"""What is known about the documents of a source once all of them were seen."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from almostgpt.config import DataConfig
from almostgpt.data.corpora import Document, Source, open_source
from almostgpt.data.filters import SeenKeys
from almostgpt.data.pieces import Piece, Task, digest_of_document, in_batches
from almostgpt.data.progress import throughput
from almostgpt.data.tokenizer import CharTokenizer
from almostgpt.data.workers import pieces_of, workers_for
from almostgpt.errors import UserError


@dataclass
class Survey:
    """How much text there is, which hash it has, and what was dropped; it grows piece by piece."""

    documents: int = 0
    characters: int = 0
    sha256: str = ""  # of names and texts, in order: each document's chained to those before
    lowest: float = 1.0  # the lowest and the highest place of a document
    highest: float = 0.0
    dropped: dict[str, int] = field(default_factory=dict)  # documents by the reason
    alphabet: str = ""  # the characters that occur, sorted; gathered where the task says so

    def add(self, piece: Piece, seen: SeenKeys | None) -> np.ndarray:
        """Takes a piece in. Returns a mask of shape (n,): its documents that are no duplicates."""
        kept = np.ones(len(piece.digests), bool) if seen is None else seen.add(piece.keys)
        chain = bytes.fromhex(self.sha256)
        for digest in piece.digests[kept]:
            chain = hashlib.sha256(chain + digest.tobytes()).digest()
        self.sha256 = chain.hex()
        if kept.any():
            places = _fractions(piece.digests[kept])
            self.lowest = min(self.lowest, float(places.min()))
            self.highest = max(self.highest, float(places.max()))
        self.documents += int(kept.sum())
        self.characters += int(piece.characters[kept].sum())
        dropped = Counter(self.dropped) + Counter(piece.dropped)
        dropped["duplicate"] += int((~kept).sum())
        self.dropped = {reason: count for reason, count in sorted(dropped.items()) if count}
        if piece.alphabet:
            self.alphabet = "".join(sorted({*self.alphabet, *piece.alphabet}))
        return kept

    def val_limit(self, val_fraction: float) -> float:
        """Documents whose :func:`place` is below this validate: at least one, and never all."""
        if self.documents < 2:
            raise UserError(
                "data.split=document needs two documents or more, and the text is one; "
                "use data.split=tail"
            )
        return min(max(val_fraction, math.nextafter(self.lowest, 1)), self.highest)

    def check_not_empty(self, label: str) -> None:
        """Raises ``UserError`` if nothing was kept."""
        if not self.documents:
            dropped = dropped_in_words(self.dropped)
            raise UserError(
                f"{label}: there is no text in it to train on{f': {dropped}' if dropped else ''}; "
                "data.path names text to train on"
            )


def task_of(data: DataConfig, source: Source, *, alphabet: bool) -> Task:
    """What is to be done to the blocks of ``source``."""
    return Task(
        source.kind, source.column, data.min_length, data.normalize, data.deduplicate, alphabet
    )


def survey_documents(
    data: DataConfig, cache: Path, workers: int | None = None, progress: bool = False
) -> Survey:
    """Reads all documents of ``data`` once; ``UserError`` for what cannot be read, or is empty."""
    source = open_source(data, cache)
    task = task_of(data, source, alphabet=data.tokenizer == CharTokenizer.name)
    seen = SeenKeys() if data.deduplicate else None
    survey = Survey()
    workers = workers or workers_for(source.size)
    batches = in_batches(source.blocks())
    with (
        throughput("reading", source.size, "characters", progress) as advance,
        closing(pieces_of(batches, task, None, workers, None)) as pieces,
    ):
        for batch, piece in pieces:
            survey.add(piece, seen)
            advance(batch.size, int(piece.characters.sum()))
    survey.check_not_empty(source.label)
    return survey


def dropped_in_words(dropped: dict[str, int]) -> str:
    """``dropped 3 duplicate, 10 short documents``; empty if there are none."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    return f"dropped {counts} documents" if counts else ""


def place(document: Document) -> float:
    """A number in [0, 1) from a hash of name and text.

    It does not depend on the other documents: whoever adds some moves none to the other split.
    """
    digest = digest_of_document(document.name, document.text.encode())
    return float(_fractions(np.frombuffer(digest, np.uint8)[None])[0])


def places(piece: Piece) -> np.ndarray:
    """The :func:`place` of each document of a piece, float64, shape (n,)."""
    return _fractions(piece.digests)


def _fractions(digests: np.ndarray) -> np.ndarray:
    """48 bits of each digest: they are exact in a float."""
    first = np.zeros((len(digests), 8), np.uint8)
    first[:, :6] = digests[:, :6]
    return first.view("<u8")[:, 0] / 2.0**48
