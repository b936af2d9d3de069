"""Batches of rows of tokens, in an order that a seed and a number determine.

Row g of a run's training is a pure function of (shards, settings, seed, g), see
:mod:`almostgpt.data.orders`, and batches take row after row. So the whole state of a loader is the
number of the next row, and a resumed run sees exactly the rows of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from almostgpt.config import not_one_of
from almostgpt.data.mixture import Shares
from almostgpt.data.orders import SAMPLINGS, Order
from almostgpt.data.shards import Piece, Shard, TokenRun
from almostgpt.data.tokenizer import Tokenizer
from almostgpt.errors import UserError

Shards = Sequence[Shard | np.ndarray]


class Batch(NamedTuple):
    """What the model is trained on in one go: ``model(*batch)``."""

    ids: torch.Tensor  # (batch_size, block_size) int64
    targets: torch.Tensor  # (batch_size, block_size) int64: the token after each of ids
    cu_seqlens: torch.Tensor | None  # see document_borders; None where documents are ignored


def document_start(documents: str, tokenizer: Tokenizer, sampling: str = "random") -> int | None:
    """The id that begins a document, where ``data.documents`` or ``data.sampling`` needs one; or None.

    Raises ``UserError`` for a tokenizer that has none.
    """
    if documents == "ignore" and sampling != "documents":
        return None
    if tokenizer.end_of_text is None:
        setting = "data.documents=packed" if documents == "packed" else "data.sampling=documents"
        other = "documents=ignore" if documents == "packed" else "sampling=shuffled"
        raise UserError(
            f"{setting} finds documents by their end-of-text token, and the "
            f"{tokenizer.name} tokenizer has none: prepare the text with data.tokenizer=byte or gpt2, "
            f"or set data.{other}"
        )
    return tokenizer.end_of_text


def document_borders(tokens: np.ndarray, end_of_text: int, pieces: Sequence[int]) -> np.ndarray:
    """Where the documents of a batch begin and end, its rows of ids taken as one sequence.

    A document begins at every ``end_of_text`` and wherever a piece of the shards does, among them
    every row of tokens: (B, T + 1); ``pieces`` are places in its B·(T + 1) tokens. Document i is
    ``[borders[i], borders[i + 1])``. int32, shape (B·T + 1,), whatever the batch holds: that is room
    for B·T documents of one token, and what is left over repeats B·T, the end.
    """
    begins = (tokens == end_of_text).reshape(-1)
    begins[pieces] = True
    rows, columns = np.divmod(np.flatnonzero(begins), tokens.shape[1])
    size, width = tokens.size - len(tokens), tokens.shape[1] - 1
    starts = (rows * width + columns)[columns < width]  # the last of a row is only a target
    borders = np.full(size + 1, size, np.int32)
    borders[: len(starts)] = starts
    return borders


class TokenLoader:
    """Takes ``batch_size`` rows at a time, of one set or of a mixture.

    Several loaders share the rows: of ``world_size`` of them, each with a ``rank`` of its own, one
    takes every ``world_size``-th row. All together see the rows that a single one would see, in its
    order; that holds too when a state is loaded by another number of loaders, or with another
    batch_size.
    """

    def __init__(
        self,
        shards: Shards | Sequence[Shards],
        *,
        block_size: int,
        batch_size: int,
        seed: int,
        sampling: str = "random",
        vocab_size: int,
        end_of_text: int | None = None,
        packed: bool | None = None,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        split: str = "train",
    ):
        """
        shards: each a :class:`~almostgpt.data.shards.Shard` or an integer array of shape (n,)
        seed: 0 to 2**128 - 1
        sampling: a key of ``SAMPLINGS``
        vocab_size: an id beyond it is refused, so that no device ever sees one
        end_of_text: the id that begins a document
        packed: whether batches have ``cu_seqlens``; by default if there is an ``end_of_text``
        weights: of a mixture: ``shards`` is then a list of shards for each weight
        rank: 0 to world_size - 1
        split: what the error messages call these shards

        Raises ``UserError`` where the shards of a set do not hold a row.
        """
        if sampling not in SAMPLINGS:
            raise UserError(f"data.sampling is {not_one_of(sampling, SAMPLINGS)}")
        self.block_size, self.batch_size, self.vocab_size = block_size, batch_size, vocab_size
        self.seed, self.sampling, self.end_of_text = seed, sampling, end_of_text
        self.packed = end_of_text is not None if packed is None else packed
        self.rank, self.world_size = rank, world_size
        self.row = 0  # number of the next batch's first row, counted over all ranks
        self._shares = Shares([1] if weights is None else weights)
        self._weights = None if weights is None else list(weights)
        self._orders: list[Order] = []
        for number, part in enumerate([shards] if weights is None else shards):
            settings = {"seed": seed, "stream": number, "drawn_together": self.rows_at_once}
            run = TokenRun(part)
            try:
                order = SAMPLINGS[sampling](run, block_size, **settings, end_of_text=end_of_text)
            except UserError as error:
                name = "" if weights is None else f" of {_name(part, number)}"
                raise UserError(f"the {split} split{name} is {error}") from error
            self._orders.append(order)
        dtype = np.result_type(*(order.run.dtype for order in self._orders))
        # Whatever a batch holds is copied out of it again.
        self._tokens = np.empty((batch_size, block_size + 1), dtype)

    @property
    def rows_at_once(self) -> int:
        """Rows in the batches of all ranks together."""
        return self.batch_size * self.world_size

    @property
    def tokens(self) -> int:
        """Tokens of all sets."""
        return sum(len(order.run) for order in self._orders)

    @property
    def windows(self) -> int:
        """Windows (``documents``: documents) of all sets that the sampling chooses from."""
        return sum(order.windows for order in self._orders)

    def next_batch(self, pin_memory: bool = False) -> Batch:
        """The next batch, in contiguous CPU tensors; pinned ones are what a GPU copies from.

        Raises ``UserError`` that names the shard which is gone, shrunk or holds an id that is not in
        the vocabulary; the batch stays the next one then.
        """
        gathered = self._gather()
        tokens = self._tokens
        if tokens.max() >= self.vocab_size or (tokens.dtype.kind == "i" and tokens.min() < 0):
            self._refuse(gathered)
        shape = self.batch_size, self.block_size
        ids, targets = (
            torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory) for _ in range(2)
        )
        np.copyto(ids.numpy(), tokens[:, :-1])
        np.copyto(targets.numpy(), tokens[:, 1:])
        cu_seqlens = None
        if self.packed:
            places = [piece[0] for pieces, _ in gathered for piece in pieces]
            borders = document_borders(tokens, self.end_of_text, places)
            cu_seqlens = torch.from_numpy(borders)
            cu_seqlens = cu_seqlens.pin_memory() if pin_memory else cu_seqlens
        self.row += self.rows_at_once
        return Batch(ids, targets, cu_seqlens)

    def _gather(self) -> list[tuple[list[Piece], TokenRun]]:
        """Fills ``_tokens``; returns the pieces that are in it, with the run that they are from."""
        room, length = self._tokens.reshape(-1), self.block_size + 1
        gathered = []
        for order, rows, numbers in self._rows():
            pieces = order.pieces(numbers, [row * length for row in rows])
            order.run.read(pieces, room)
            gathered.append((pieces, order.run))
        return gathered

    def _rows(self) -> Iterator[tuple[Order, Sequence[int], Sequence[int]]]:
        """For each set: which rows of this batch are its, and their numbers among its own."""
        whole = range(self.row + self.rank, self.row + self.rows_at_once, self.world_size)
        if len(self._orders) == 1:
            yield self._orders[0], range(self.batch_size), whole
            return
        sets, numbers = self._shares.assign(self.row, self.rows_at_once)
        sets, numbers = sets[self.rank :: self.world_size], numbers[self.rank :: self.world_size]
        for number, order in enumerate(self._orders):
            rows = np.flatnonzero(sets == number)
            yield order, rows.tolist(), numbers[rows].tolist()

    def _refuse(self, gathered: list[tuple[list[Piece], TokenRun]]) -> NoReturn:
        tokens = self._tokens.reshape(-1)
        bad = int(np.flatnonzero((tokens >= self.vocab_size) | (tokens < 0))[0])
        each = [(piece, run) for pieces, run in gathered for piece in pieces]
        (place, position, _), run = next(e for e in each if e[0][0] <= bad < e[0][0] + e[0][2])
        raise UserError(
            f"{run.name_at(position + bad - place)}: token id {tokens[bad]} is not in the vocabulary "
            f"of {self.vocab_size} tokens: the shard was made with another tokenizer, or is damaged"
        )

    def state_dict(self) -> dict[str, Any]:
        """The next row, and what must be equal for it to be the same; JSON values."""
        return {
            "row": self.row,
            # Not of this loader, but of the one that began: random windows are drawn by its batches.
            "batch_size": self._orders[0].drawn_together,
            "seed": self.seed,
            "sampling": self.sampling,
            "end_of_text": self.end_of_text if self.packed else None,
            "block_size": self.block_size,
            "tokens": self.tokens,
            "windows": self.windows,
            "weights": self._weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with the row that was next when ``state`` was taken.

        States of earlier versions count batches instead of rows, and have no weights; those from
        before documents could be packed no end_of_text.

        Raises ``UserError`` with both values where the state belongs to other data or settings.
        """
        mine = self.state_dict()
        problems = [
            f"{key} is {state.get(key)!r} in the state and {mine[key]!r} here"
            for key in mine
            if key not in ("row", "batch_size") and state.get(key) != mine[key]
        ]
        counted = "row" if "row" in state else "batch"
        for key, least in ((counted, 0), ("batch_size", 1)):
            if not isinstance(state.get(key), int) or state[key] < least:
                problems.append(f"{key} is {state.get(key)!r}, not a number of rows or batches")
        if problems:
            raise UserError("the saved loader state does not fit: " + "; ".join(problems))
        self.row = state[counted] * (1 if counted == "row" else state["batch_size"])
        for order in self._orders:
            order.drawn_together = state["batch_size"]


def _name(shards: Shards, number: int) -> str:
    """What a user knows a set of a mixture by."""
    file = getattr(shards[0], "filename", None) if len(shards) else None
    return str(Path(file).parent) if file else f"set {number} of the mixture"
