"""Batches of token windows, in an order that a seed and a counter determine.

Batch ``n`` is a pure function of (shards, settings, seed, n). So the whole state of a loader is the
number of its next batch, and a resumed run sees exactly the batches of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from almostgpt.config import not_one_of
from almostgpt.data.tokenizer import Tokenizer
from almostgpt.errors import UserError


def draw_random(seed: int, batch: int, batch_size: int, windows: int) -> np.ndarray:
    """Window numbers of a batch, int64 (batch_size,): uniform in [0, windows), with replacement."""
    # Philox is a function of (key, counter): no batch depends on the drawing of another, and its
    # raw output never changes, unlike the numbers that a numpy Generator derives from it.
    raw = np.random.Philox(key=seed, counter=batch << 64).random_raw(batch_size)
    return np.array([(r * windows) >> 64 for r in raw.tolist()], np.int64)


def draw_sequential(seed: int, batch: int, batch_size: int, windows: int) -> np.ndarray:
    """Window numbers of a batch, int64 (batch_size,): in order, round and round."""
    return (batch * batch_size + np.arange(batch_size, dtype=np.int64)) % windows


SAMPLINGS = {"random": draw_random, "sequential": draw_sequential}


class Batch(NamedTuple):
    """What the model is trained on in one go: ``model(*batch)``."""

    ids: torch.Tensor  # (batch_size, block_size) int64
    targets: torch.Tensor  # (batch_size, block_size) int64: the token after each of ids
    cu_seqlens: torch.Tensor | None  # see document_borders; None where documents are ignored


def document_start(documents: str, tokenizer: Tokenizer) -> int | None:
    """The id that begins a document where ``data.documents`` is ``packed``, else None.

    Raises ``UserError`` for a tokenizer that has none.
    """
    if documents == "ignore":
        return None
    if tokenizer.end_of_text is None:
        raise UserError(
            "data.documents=packed finds documents by their end-of-text token, and the "
            f"{tokenizer.name} tokenizer has none: prepare the text with data.tokenizer=byte or gpt2, "
            "or set data.documents=ignore"
        )
    return tokenizer.end_of_text


def document_borders(ids: np.ndarray, end_of_text: int) -> np.ndarray:
    """Where the documents of a batch begin and end, its rows taken as one sequence.

    A document begins at every ``end_of_text`` and at every row of ids: (B, T); document i is
    ``[borders[i], borders[i + 1])``. int32, shape (B·T + 1,), whatever the batch holds: that is room
    for B·T documents of one token, and what is left over repeats B·T, the end.
    """
    begins = ids == end_of_text
    begins[:, 0] = True
    starts = np.flatnonzero(begins)
    borders = np.full(ids.size + 1, ids.size, np.int32)
    borders[: len(starts)] = starts
    return borders


class TokenLoader:
    """Draws windows of ``block_size + 1`` tokens; a window never crosses from shard to shard.

    random: windows may start at every token. sequential: each starts where the one before ended.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        *,
        block_size: int,
        batch_size: int,
        seed: int,
        sampling: str = "random",
        vocab_size: int,
        end_of_text: int | None = None,
        split: str = "train",
    ):
        """
        shards: integer arrays of shape (n,), such as :func:`almostgpt.data.shards.open_shard` gives
        seed: 0 to 2**128 - 1
        sampling: a key of ``SAMPLINGS``
        vocab_size: an id beyond it is refused, so that no device ever sees one
        end_of_text: the id that begins a document; with it batches have ``cu_seqlens``
        split: what the error messages call these shards

        Raises ``UserError`` where no shard holds ``block_size + 1`` tokens.
        """
        if sampling not in SAMPLINGS:
            raise UserError(f"data.sampling is {not_one_of(sampling, SAMPLINGS)}")
        self.block_size, self.batch_size, self.vocab_size = block_size, batch_size, vocab_size
        self.seed, self.sampling, self.end_of_text = seed, sampling, end_of_text
        self.batch = 0  # number of the next batch
        self._names = [str(getattr(s, "filename", f"shard {i}")) for i, s in enumerate(shards)]
        # Plain views: slicing a numpy.memmap itself costs several times as much.
        self._shards = [np.asarray(shard) for shard in shards]
        self._dtype = np.result_type(*self._shards) if shards else np.dtype(np.uint16)
        self._stride = block_size if sampling == "sequential" else 1
        lengths = np.array([len(shard) for shard in shards], np.int64)
        # A window at s reads the tokens s .. s + block_size: the last one is only a target.
        in_shard = np.maximum(0, (lengths - 1 - block_size) // self._stride + 1)
        self._first = np.concatenate([[0], np.cumsum(in_shard)])  # number of a shard's first window
        self.windows = int(self._first[-1])
        self.tokens = int(lengths.sum())
        if not self.windows:
            raise UserError(
                f"the {split} split is too small: its longest shard has "
                f"{max(lengths.tolist(), default=0)} tokens, and model.block_size={block_size} "
                f"needs {block_size + 1}; take a smaller block_size, more text or another "
                "data.val_fraction"
            )

    def next_batch(self) -> Batch:
        """The next batch, in contiguous CPU tensors.

        Raises ``UserError`` that names the shard and the id where a token is not in the vocabulary.
        """
        draw = SAMPLINGS[self.sampling]
        windows = draw(self.seed, self.batch, self.batch_size, self.windows)
        shards = np.searchsorted(self._first, windows, side="right") - 1
        starts = (windows - self._first[shards]) * self._stride
        tokens = np.empty((self.batch_size, self.block_size + 1), self._dtype)
        for row, (shard, start) in enumerate(zip(shards.tolist(), starts.tolist(), strict=True)):
            tokens[row] = self._shards[shard][start : start + self.block_size + 1]
        if tokens.max() >= self.vocab_size or tokens.min() < 0:
            self._refuse(tokens, shards)
        self.batch += 1
        ids, targets = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
        cu_seqlens = None
        if self.end_of_text is not None:
            cu_seqlens = torch.from_numpy(document_borders(ids, self.end_of_text))
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets), cu_seqlens)

    def state_dict(self) -> dict[str, Any]:
        """Integers and one text: the next batch, and what must be equal for it to be the same."""
        return {
            "batch": self.batch,
            "seed": self.seed,
            "sampling": self.sampling,
            "end_of_text": self.end_of_text,  # states from before it was here have none: None too
            "block_size": self.block_size,
            "batch_size": self.batch_size,
            "tokens": self.tokens,
            "windows": self.windows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with the batch that was next when ``state`` was taken.

        Raises ``UserError`` with both values where the state belongs to other data or settings.
        """
        mine = self.state_dict()
        problems = [
            f"{key} is {state.get(key)!r} in the state and {mine[key]!r} here"
            for key in mine
            if key != "batch" and state.get(key) != mine[key]
        ]
        if not isinstance(state.get("batch"), int) or state["batch"] < 0:
            problems.append(f"batch is {state.get('batch')!r}, not a number of batches")
        if problems:
            raise UserError("the saved loader state does not fit: " + "; ".join(problems))
        self.batch = state["batch"]

    def _refuse(self, tokens: np.ndarray, shards: np.ndarray) -> NoReturn:
        row, column = np.argwhere((tokens >= self.vocab_size) | (tokens < 0))[0]
        raise UserError(
            f"{self._names[shards[row]]}: token id {tokens[row, column]} is not in the vocabulary "
            f"of {self.vocab_size} tokens: the shard was made with another tokenizer, or is damaged"
        )
