"""In which order a set's tokens come: the samplings, each a function from row numbers to pieces.

A row is ``block_size + 1`` tokens: what a batch has as ids and, shifted by one, as targets. Rows are
numbered from 0 on without end. Row g is a list of pieces (position in the run, length) that is a
function of (tokens, settings, seed, g) alone: so whoever takes the rows, in batches of whatever size
and on however many machines, the order of them all is the same, and a number is the whole state.

    random       windows that begin at any token, drawn with replacement
    sequential   window after window, round and round
    shuffled     all windows once an epoch, in a new order each time
    documents    all documents once an epoch, in a new order each time, laid end to end
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from almostgpt.data.permutation import BLOCK, BlockwisePermutation
from almostgpt.data.progress import progress_bar
from almostgpt.data.shards import TokenRun
from almostgpt.errors import UserError

Pieces = list[tuple[int, int]]  # (position, length): tokens position .. position + length - 1
BAR_FROM_TOKENS = 1 << 30  # about two seconds of looking for documents


class Order:
    """What all orders have.

    Args:
        run: the tokens.
        block_size: targets in a row, which has one token more.
        seed: 0 to 2¹²⁸ − 1.
        stream: tells the sets of a mixture apart, 0 to 2⁶⁴ − 1.
        drawn_together: rows that ``random`` draws with one counter: those of the first batch.
        end_of_text: the id that begins a document; only ``documents`` needs it.

    Raises ``UserError`` where the run is too short for a row.
    """

    windows: int  # windows, or documents, to choose from

    def __init__(
        self,
        run: TokenRun,
        block_size: int,
        *,
        seed: int,
        stream: int = 0,
        drawn_together: int = 1,
        end_of_text: int | None = None,
    ):
        self.run, self.block_size, self.end_of_text = run, block_size, end_of_text
        self.seed, self.stream, self.drawn_together = seed, stream, drawn_together
        self._set_up()

    def rows(self, numbers: np.ndarray) -> list[Pieces]:
        """The pieces of the rows ``numbers``: int64 (n,), ascending; rows may be left out."""
        raise NotImplementedError

    def _set_up(self) -> None:
        if len(self.run) <= self.block_size:
            raise self._too_small(f"it has {len(self.run)} tokens")

    def _too_small(self, what: str) -> UserError:
        return UserError(
            f"too small: {what}, and model.block_size={self.block_size} needs "
            f"{self.block_size + 1}; take a smaller block_size, more text or another "
            "data.val_fraction"
        )

    def _permutation(self, n: int, epoch: int) -> BlockwisePermutation:
        # Beside the counters of random draws, which have nothing in the third word.
        counter = (self.stream << 192) + (1 << 128) + (epoch << 64)
        return BlockwisePermutation(n, self.seed, counter)


class WindowsInShards(Order):
    """Windows that never cross from shard to shard; they begin at every ``stride``-th token of one."""

    stride: int

    def _set_up(self) -> None:
        lengths = np.array(self.run.lengths, np.int64)
        # A window at s reads the tokens s .. s + block_size: the last one is only a target.
        in_shard = np.maximum(0, (lengths - 1 - self.block_size) // self.stride + 1)
        self._first = np.cumsum([0, *in_shard])  # number of a shard's first window
        self._starts = np.cumsum([0, *lengths])  # position of a shard's first token
        self.windows = int(self._first[-1])
        if not self.windows:
            longest = max(lengths.tolist(), default=0)
            raise self._too_small(f"its longest shard has {longest} tokens")

    def rows(self, numbers: np.ndarray) -> list[Pieces]:
        windows = self._windows(numbers)
        shards = np.searchsorted(self._first, windows, side="right") - 1
        positions = self._starts[shards] + (windows - self._first[shards]) * self.stride
        return [[(position, self.block_size + 1)] for position in positions.tolist()]

    def _windows(self, numbers: np.ndarray) -> np.ndarray:
        """Which window each row is."""
        raise NotImplementedError


class RandomWindows(WindowsInShards):
    """Every start is as likely as any other, in every row."""

    stride = 1

    def _windows(self, numbers: np.ndarray) -> np.ndarray:
        # Philox is a function of (key, counter): no draw depends on another, and its raw output
        # never changes, unlike the numbers that a numpy Generator derives from it.
        draws, words = np.divmod(numbers, self.drawn_together)
        windows = []
        for draw in range(int(draws[0]), int(draws[-1]) + 1):
            counter = (self.stream << 192) + (draw << 64)
            wanted = words[draws == draw].tolist()
            if wanted:
                philox = np.random.Philox(key=self.seed, counter=counter)
                raw = philox.random_raw(wanted[-1] + 1).tolist()
                windows += [(raw[word] * self.windows) >> 64 for word in wanted]
        return np.array(windows, np.int64)


class SequentialWindows(WindowsInShards):
    """Each window begins where the one before ended."""

    @property
    def stride(self) -> int:
        return self.block_size

    def _windows(self, numbers: np.ndarray) -> np.ndarray:
        return numbers % self.windows


class ShuffledWindows(Order):
    """The run as a ring, cut into windows that lie end to end; each epoch takes its own in a new order.

    With n tokens and rows of T, window k covers the ring from k·T mod n on, and epoch e has the
    windows that begin in lap e: those with ⌊k·T/n⌋ = e. So no token is ever left out: every lap
    sees each exactly once (its last window reaches into the next, by less than T tokens), and the cuts
    fall elsewhere in every epoch.
    """

    def _set_up(self) -> None:
        super()._set_up()
        self.windows = self._first_of(1)
        self._epoch = -1

    def rows(self, numbers: np.ndarray) -> list[Pieces]:
        return [self._row(number) for number in numbers.tolist()]

    def _row(self, number: int) -> Pieces:
        tokens = len(self.run)
        epoch = number * self.block_size // tokens
        if epoch != self._epoch:
            self._epoch, self._start = epoch, self._first_of(epoch)
            self._shuffle = self._permutation(self._first_of(epoch + 1) - self._start, epoch)
        window = self._start + self._shuffle.at(number - self._start)
        position, left = window * self.block_size % tokens, self.block_size + 1
        # After the last token comes the first one, where another document begins: a new piece.
        first = min(left, tokens - position)
        return [(position, first), (0, left - first)] if first < left else [(position, left)]

    def _first_of(self, epoch: int) -> int:
        """Number of an epoch's first window."""
        return -(-epoch * len(self.run) // self.block_size)


class ShuffledDocuments(Order):
    """Documents laid end to end, all of them once an epoch, and cut into rows.

    A document begins at each ``end_of_text`` and at the first token of the run. The stream of tokens
    that an epoch lays has the run's length, whatever its order: so the epoch of a row, and how far
    into it the row begins, are known at once. Which document is there is found by adding up lengths
    from the last place that was found, or from the epoch's beginning: 0.2 us a document.

    It reads the run once to find the documents, and keeps 8 bytes for each.
    """

    def _set_up(self) -> None:
        super()._set_up()
        assert self.end_of_text is not None, "documents are found by their first token"
        show = len(self.run) > BAR_FROM_TOKENS
        with progress_bar("finding documents", len(self.run), show) as advance:
            found = self.run.find(self.end_of_text, advance)
        starts = found if len(found) and found[0] == 0 else np.concatenate([[0], found])
        self._positions = starts
        self._lengths = np.diff(starts, append=len(self.run))
        self.windows = len(starts)
        self._epoch = -1

    def rows(self, numbers: np.ndarray) -> list[Pieces]:
        return [self._row(number) for number in numbers.tolist()]

    def _row(self, number: int) -> Pieces:
        pieces: Pieces = []
        place, left = number * self.block_size, self.block_size + 1
        while left:
            position, length = self._at(place)
            pieces.append((position, min(length, left)))
            place, left = place + length, left - pieces[-1][1]
        return pieces

    def _at(self, place: int) -> tuple[int, int]:
        """What lies at a place in the stream of all epochs: (position, tokens from there on)."""
        epoch, place = divmod(place, len(self.run))
        if epoch != self._epoch or place < self._offsets[0]:
            self._epoch, self._shuffle = epoch, self._permutation(self.windows, epoch)
            self._load(0, 0)
        while place >= self._offsets[-1]:
            self._load(self._block + BLOCK, self._offsets[-1])
        number = bisect_right(self._offsets, place) - 1
        document = self._documents[number]
        within = place - self._offsets[number]
        return int(self._positions[document]) + within, self._offsets[number + 1] - place

    def _load(self, first: int, offset: int) -> None:
        """The documents from the ``first`` of the epoch's order on, which lies at ``offset``."""
        self._block = first
        numbers = np.arange(first, min(first + BLOCK, self.windows))
        documents = self._shuffle(numbers)
        self._documents = documents.tolist()
        self._offsets = (np.cumsum([0, *self._lengths[documents]]) + offset).tolist()


SAMPLINGS: dict[str, type[Order]] = {
    "random": RandomWindows,
    "sequential": SequentialWindows,
    "shuffled": ShuffledWindows,
    "documents": ShuffledDocuments,
}
