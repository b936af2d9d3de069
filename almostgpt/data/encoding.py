"""A source to runs of tokens in a working folder, from wherever the journal of the folder says."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

from almostgpt.config import DataConfig
from almostgpt.data.corpora import Source
from almostgpt.data.dataset import SPLITS
from almostgpt.data.filters import SeenKeys
from almostgpt.data.journal import SEEN, Journal, read_keys
from almostgpt.data.pieces import Batch, Piece, Task, in_batches
from almostgpt.data.progress import throughput
from almostgpt.data.survey import places
from almostgpt.data.token_runs import RunWriter
from almostgpt.data.tokenizer import Tokenizer
from almostgpt.data.workers import pieces_of
from almostgpt.errors import UserError

JOURNAL_EVERY = 10  # seconds between entries, at most; each finished shard makes one, too


class SourceChanged(UserError):
    """What was encoded so far is not what the source holds now."""


def encode_source(
    source: Source,
    task: Task,
    data: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    journal: Journal,
    workers: int,
    progress: bool,
) -> dict[str, RunWriter]:
    """Encodes what the journal does not have yet. Split by tail there is one run, ``all``: where the
    tail begins is known at its end.

    The tokenizer is saved in ``folder``. Raises ``UserError`` for what cannot be read or encoded, after
    all that comes before it was written, and ``OSError`` as the file system does.
    """
    names = ("all",) if data.split == "tail" else SPLITS
    runs = {name: RunWriter(folder, name, data.shard_tokens, tokenizer.dtype) for name in names}
    if journal.encoded:
        for name, run in runs.items():
            run.shards = list(journal.runs[name]["shards"])
        return runs
    with ExitStack() as stack:
        for name, run in runs.items():
            stack.callback(run.close)
            if name in journal.runs:
                run.restore(journal.runs[name])
        sink = _Sink(runs, tokenizer, folder, journal, data)
        stack.callback(sink.close)
        batches = _remaining(in_batches(source.blocks()), journal, folder)
        advance = stack.enter_context(throughput("encoding", source.size, "tokens", progress))
        # Closed at once, whatever happens: the workers must not outlive an error.
        pieces = pieces_of(batches, task, tokenizer, workers, folder)
        stack.callback(pieces.close)
        try:
            for batch, piece in pieces:
                sink.take(batch, piece)
                advance(batch.size, len(piece.tokens))
        except UserError:
            sink.write_journal()
            raise
        for run in runs.values():
            run.finish()
        journal.encoded = True
        sink.write_journal()
    return runs


def _remaining(batches: Iterator[Batch], journal: Journal, folder: Path) -> Iterator[Batch]:
    """The batches after those of the journal, which are only read, not understood, once more."""
    chain = b""
    for batch in islice(batches, journal.batches):
        chain = batch.chained(chain)
    if chain.hex() != journal.source:
        raise SourceChanged(
            f"the text has changed since a part of it was encoded: delete {folder} to begin anew"
        )
    yield from batches


class _Sink:
    """Takes pieces in order: drops duplicates, writes tokens, keeps the journal."""

    def __init__(
        self,
        runs: dict[str, RunWriter],
        tokenizer: Tokenizer,
        folder: Path,
        journal: Journal,
        data: DataConfig,
    ):
        self.runs, self.folder, self.journal = runs, folder, journal
        self.separated = tokenizer.end_of_text is not None
        self.seen = self.keys = None
        if data.deduplicate:
            self.seen = SeenKeys(read_keys(folder, journal.keys))
            self.keys = open(folder / SEEN, "ab")
        self._finished = self._count_finished()
        self._written = time.monotonic()

    def take(self, batch: Batch, piece: Piece) -> None:
        kept = self.journal.survey.add(piece, self.seen)
        if self.keys is not None:
            self.keys.write(piece.keys[kept].tobytes())
            self.journal.keys += int(kept.sum())
        if "all" in self.runs:
            self._append("all", piece, kept)
        else:
            validates = places(piece) < self.journal.val_limit
            self._append("train", piece, kept & ~validates)
            self._append("val", piece, kept & validates)
        self.journal.batches += 1
        self.journal.source = batch.chained(bytes.fromhex(self.journal.source)).hex()
        due = time.monotonic() - self._written >= JOURNAL_EVERY
        if due or self._count_finished() > self._finished:
            self.write_journal()

    def _append(self, name: str, piece: Piece, wanted: np.ndarray) -> None:
        """The wanted documents of a piece; each brings its separator, which a run's first has not."""
        run = self.runs[name]
        tokens = piece.tokens if wanted.all() else piece.tokens[np.repeat(wanted, piece.lengths)]
        run.append(tokens[1:] if self.separated and not run.tokens and len(tokens) else tokens)

    def _count_finished(self) -> int:
        return sum(len(run.shards) for run in self.runs.values())

    def write_journal(self) -> None:
        if self.keys is not None:
            self.keys.flush()
            os.fsync(self.keys.fileno())
        self.journal.runs = {name: run.state() for name, run in self.runs.items()}
        self.journal.write(self.folder)
        self._finished, self._written = self._count_finished(), time.monotonic()

    def close(self) -> None:
        if self.keys is not None:
            self.keys.close()
