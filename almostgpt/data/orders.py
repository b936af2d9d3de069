"""In which order a set's tokens come: the samplings, each a function from row numbers to pieces.

A row is ``block_size + 1`` tokens: what a batch has as ids and, shifted by one, as targets. Rows are
numbered from 0 on without end. Row g consists of pieces of the run, which are a function of (tokens,
settings, seed, g) alone: so whoever takes the rows, in batches of whatever size and on however many
machines, the order of them all is the same, and a number is the whole state.

    random       windows that begin at any token, drawn with replacement
    sequential   window after window, round and round
    shuffled     all windows once an epoch, in a new order each time
    documents    all documents once an epoch, in a new order each time, laid end to end
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from almostgpt.data.permutation import BLOCK, BlockwisePermutation
from almostgpt.data.progress import progress_bar
from almostgpt.data.shards import Piece, TokenRun
from almostgpt.errors import UserError

BAR_FROM_TOKENS = 1 << 30  # about two seconds of looking for documents


class Order(ABC):
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

    @abstractmethod
    def pieces(self, numbers: Sequence[int], places: Sequence[int]) -> list[Piece]:
        """What rows consist of: those with ``numbers``, ascending, each to go to one of ``places``."""

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
        # A window at s reads the tokens s .. s + block_size: the last one is only a target.
        lengths = self.run.lengths
        in_shard = [max(0, (n - 1 - self.block_size) // self.stride + 1) for n in lengths]
        self._first = np.cumsum([0, *in_shard]).tolist()  # number of a shard's first window
        self.windows = self._first[-1]
        if not self.windows:
            raise self._too_small(f"its longest shard has {max(lengths, default=0)} tokens")

    def pieces(self, numbers: Sequence[int], places: Sequence[int]) -> list[Piece]:
        pieces = []
        for place, window in zip(places, self._windows(numbers), strict=True):
            shard = bisect_right(self._first, window) - 1
            position = self.run.starts[shard] + (window - self._first[shard]) * self.stride
            pieces.append((place, position, self.block_size + 1))
        return pieces

    @abstractmethod
    def _windows(self, numbers: Sequence[int]) -> list[int]:
        """Which window each row is."""


class RandomWindows(WindowsInShards):
    """Every start is as likely as any other, in every row."""

    stride = 1

    def _set_up(self) -> None:
        super()._set_up()
        self._philox = np.random.Philox(key=self.seed)
        self._fresh = self._philox.state  # to be set is an eighth of the time that to be made takes

    def _windows(self, numbers: Sequence[int]) -> list[int]:
        windows, drawn, words = [], -1, []
        for number in numbers:
            draw, word = divmod(number, self.drawn_together)
            if draw != drawn:
                drawn, words = draw, self._draw(draw)
            windows.append((words[word] * self.windows) >> 64)
        return windows

    def _draw(self, draw: int) -> list[int]:
        # Philox is a function of (key, counter): no draw depends on another, and its raw output
        # never changes, unlike the numbers that a numpy Generator derives from it.
        self._fresh["state"]["counter"][:] = 0, draw, 0, self.stream
        self._philox.state = self._fresh
        return self._philox.random_raw(self.drawn_together).tolist()


class SequentialWindows(WindowsInShards):
    """Each window begins where the one before ended."""

    @property
    def stride(self) -> int:
        return self.block_size

    def _windows(self, numbers: Sequence[int]) -> list[int]:
        return [number % self.windows for number in numbers]


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

    def pieces(self, numbers: Sequence[int], places: Sequence[int]) -> list[Piece]:
        pieces, tokens, length = [], len(self.run), self.block_size + 1
        for number, place in zip(numbers, places, strict=True):
            epoch = number * self.block_size // tokens
            if epoch != self._epoch:
                self._epoch, self._start = epoch, self._first_of(epoch)
                self._shuffle = self._permutation(self._first_of(epoch + 1) - self._start, epoch)
            window = self._start + self._shuffle.at(number - self._start)
            position = window * self.block_size % tokens
            if position + length <= tokens:
                pieces.append((place, position, length))
            else:  # after the last token comes the first one, where another document begins
                head = tokens - position
                pieces += [(place, position, head), (place + head, 0, length - head)]
        return pieces

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
        self._starts = starts
        self._lengths = np.diff(starts, append=len(self.run))
        self.windows = len(starts)
        self._epoch = -1

    def pieces(self, numbers: Sequence[int], places: Sequence[int]) -> list[Piece]:
        pieces = []
        for number, place in zip(numbers, places, strict=True):
            epoch, offset = divmod(number * self.block_size, len(self.run))
            end = place + self.block_size + 1
            self._seek(epoch, offset)
            document = bisect_right(self._offsets, offset) - 1  # of this block
            within = offset - self._offsets[document]
            while place < end:
                if document == len(self._positions):  # on to the next block, or epoch
                    self._load_next()
                    document = 0
                length = self._offsets[document + 1] - self._offsets[document] - within
                length = min(length, end - place)
                pieces.append((place, self._positions[document] + within, length))
                place, document, within = place + length, document + 1, 0
        return pieces

    def _seek(self, epoch: int, offset: int) -> None:
        """Loads the documents around an offset into an epoch."""
        if epoch != self._epoch or offset < self._offsets[0]:
            self._load(epoch, 0, 0)
        while offset >= self._offsets[-1]:
            self._load_next()

    def _load_next(self) -> None:
        following = self._block + BLOCK
        if following < self.windows:
            self._load(self._epoch, following, self._offsets[-1])
        else:
            self._load(self._epoch + 1, 0, 0)

    def _load(self, epoch: int, first: int, offset: int) -> None:
        """The documents from the ``first`` of an epoch's order on, which lies at ``offset`` in it."""
        if epoch != self._epoch:
            self._epoch, self._shuffle = epoch, self._permutation(self.windows, epoch)
        self._block = first
        documents = self._shuffle(np.arange(first, min(first + BLOCK, self.windows)))
        self._positions = self._starts[documents].tolist()
        self._offsets = np.cumsum([offset, *self._lengths[documents]]).tolist()


SAMPLINGS: dict[str, type[Order]] = {
    "random": RandomWindows,
    "sequential": SequentialWindows,
    "shuffled": ShuffledWindows,
    "documents": ShuffledDocuments,
}
