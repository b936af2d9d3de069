"""Several prepared sets as one: each row of a batch comes from one of them, in given proportions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from almostgpt.data.dataset import Dataset, digest_of
from almostgpt.data.shards import Shard
from almostgpt.data.tokenizer import Tokenizer
from almostgpt.errors import UserError


class Shares:
    """Which set each row belongs to: spread evenly, so that the proportions hold everywhere.

    Of the first g rows the set with the largest weight has ⌊g·w + ½⌋, w being its share of all
    weights; of the others' rows the next largest has as many by its share of their weights, and so on.
    So the first g rows hold what they should of each of k sets within ½ + (1 + ½ + … + 1/(k − 1))/2
    rows, less than two for up to eleven sets, however large g is. Weights count as they are written:
    0.7 is 7/10.

    Args:
        weights: positive numbers, one a set; only their proportions count.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]
        descending = sorted(range(len(exact)), key=lambda number: -exact[number])
        self._shares, left = [], sum(exact)
        for number in descending:
            # Products of row numbers in a batch and numerators must fit into int64.
            share = (exact[number] / left).limit_denominator(1 << 40)
            self._shares.append((number, *share.as_integer_ratio()))
            left -= exact[number]

    def assign(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """For rows first .. first + count − 1: their sets, and their numbers among that set's rows.

        Both int64 (count,); count is at most 2²².
        """
        sets, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
        rows = np.arange(count)  # those that belong to no set yet; they count on from `first`
        for number, share, of in self._shares:
            before, rest = divmod(first * share + of // 2, of)
            # How many of the rows are this set's: before each, and in the end before the next.
            taken = before + (rest + np.arange(len(rows) + 1) * share) // of
            mine = np.diff(taken) > 0
            sets[rows[mine]], numbers[rows[mine]] = number, taken[:-1][mine]
            rows, first = rows[~mine], first - before
        return sets, numbers


@dataclass(frozen=True)
class Mixture:
    """Prepared sets with weights; it trains as a :class:`Dataset` does. Made by :meth:`of`."""

    sets: tuple[Dataset, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, sets: Sequence[Dataset], weights: Sequence[float]) -> Mixture:
        """In an order that does not depend on the one given, nor on the folders' names.

        Raises ``UserError`` where their token ids do not mean the same, or a split is empty.
        """
        first, *others = sets
        for part in sets:
            if not (part.train_tokens and part.val_tokens):
                split = "validation" if part.train_tokens else "training"
                raise UserError(
                    f"data.mixture: the {split} split of {part.folder} is empty: prepare it with "
                    "another data.val_fraction"
                )
        for other in others:
            if not other.tokenizer.same_as(first.tokenizer):
                raise UserError(
                    f"data.mixture: {first.folder} has the {first.tokenizer.name} tokenizer "
                    f"({first.vocab_size} ids) and {other.folder} another, {other.tokenizer.name} "
                    f"({other.vocab_size} ids): prepare them with the same data.tokenizer"
                )
        pairs = sorted(zip(sets, weights, strict=True), key=lambda p: (p[0].fingerprint, p[1]))
        return cls(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))

    @property
    def tokenizer(self) -> Tokenizer:
        """The one of all sets."""
        return self.sets[0].tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def train(self) -> list[list[Shard]]:
        """The shards to train on, a list for each set."""
        return [part.train for part in self.sets]

    @property
    def val(self) -> list[list[Shard]]:
        """The shards to validate on, a list for each set."""
        return [part.val for part in self.sets]

    @property
    def train_tokens(self) -> int:
        """Tokens to train on, of all sets together."""
        return sum(part.train_tokens for part in self.sets)

    @property
    def val_tokens(self) -> int:
        """Tokens to validate on, of all sets together."""
        return sum(part.val_tokens for part in self.sets)

    @property
    def fingerprint(self) -> str:
        """Equal for equal sets and proportions."""
        whole = math.fsum(self.weights)
        shares = [weight / whole for weight in self.weights]
        return digest_of({"sets": [part.fingerprint for part in self.sets], "shares": shares})
