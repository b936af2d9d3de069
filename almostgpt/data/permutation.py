"""A random order of n things that takes no memory: their places are computed, one by one.

A number below n is written as two digits (left, right) of a mixed base a × b, the smallest that holds
n. A round adds a keyed hash of one digit to the other, and can be undone by subtracting it: so all
rounds together are a bijection of the a·b pairs (a Feistel network; Luby & Rackoff 1988). Where it
leads beyond n it is applied again, until it does not: that is a bijection of the numbers below n
("cycle walking": Black & Rogaway 2002, "Ciphers with arbitrary finite domains").

The hash is the finaliser of SplitMix64 (Steele, Lea & Flood 2014), the round keys are words of
Philox4x64-10. All of it is integer arithmetic, so an order is the same under every version of every
library. It is for shuffling, not for secrets.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 16  # with 8 some orders of five things come twice as often as others; with 16 none does
BLOCK = 4096  # numbers computed in one go by a BlockwisePermutation: some 100 ns each, not 200 us


class Permutation:
    """A bijection of 0 .. n − 1 drawn by the key.

    Args:
        n: 0 to 2⁶².
        key: 0 to 2¹²⁸ − 1.
        counter: which of the permutations of the key, 0 to 2²⁵⁶ − 1.
    """

    def __init__(self, n: int, key: int, counter: int = 0):
        self.n = n
        left = math.isqrt(max(n, 1) - 1) + 1  # at least the square root of n
        right = -(-max(n, 1) // left)
        self._bases = np.uint64(left), np.uint64(right)
        self._keys = np.random.Philox(key=key, counter=counter).random_raw(ROUNDS)

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """The images of ``numbers`` (int64, each 0 to n − 1), of their shape, int64."""
        images = self._rounds(numbers.astype(np.uint64))
        beyond = np.flatnonzero(images >= self.n)
        while len(beyond):
            images[beyond] = self._rounds(images[beyond])
            beyond = beyond[images[beyond] >= self.n]
        return images.astype(np.int64)

    def _rounds(self, numbers: np.ndarray) -> np.ndarray:
        base, other_base = self._bases
        digit, other = np.divmod(numbers, other_base)
        for key in self._keys:
            # The hash loses a bit so that the sum does not overflow: bases are below 2³².
            digit = (digit + (_hash(other + key) >> np.uint64(1))) % base
            digit, other, base, other_base = other, digit, other_base, base
        # An even number of rounds: the digits are back in their places.
        return digit * other_base + other


class BlockwisePermutation(Permutation):
    """The same, for numbers that come one after the other: it computes a block of them at a time."""

    _start = -BLOCK
    _block: tuple[int, ...] | list[int] = ()

    def at(self, number: int) -> int:
        """The image of one number."""
        place = number - self._start
        if not 0 <= place < len(self._block):
            self._start = number - number % BLOCK
            stop = min(self._start + BLOCK, self.n)
            self._block = self(np.arange(self._start, stop)).tolist()
            place = number - self._start
        return self._block[place]


def _hash(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
