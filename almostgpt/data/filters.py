"""What is done to the documents of every corpus alike: normalisation, minimum length, duplicates."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from almostgpt.data.corpora import Document

KEY_BYTES = 16  # of the hash by which equal texts are found
KEYS = np.dtype(f"S{KEY_BYTES}")


def kept_documents(
    documents: Iterable[Document], normalize: str, min_length: int, dropped: Counter[str]
) -> Iterator[Document]:
    """The documents to keep, normalised; ``dropped`` counts the others by the reason."""
    for document in documents:
        text = document.text
        if normalize != "none":
            text = unicodedata.normalize(normalize, text)
        if not text:
            dropped["empty"] += 1
        elif len(text) < min_length:
            dropped["short"] += 1
        else:
            yield document._replace(text=text)


def key_of(text: bytes) -> bytes:
    """16 bytes that are equal for equal texts, and for others with probability 2⁻¹²⁸."""
    return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()


class SeenKeys:
    """A set of 16-byte keys in 16 bytes a key, which a Python set would spend 100 on.

    Sorted runs, each more than twice as long as the next, as in a log-structured merge tree: adding
    n keys costs O(n log n) in all, and looking one up a binary search in each of O(log n) runs.
    """

    def __init__(self, keys: np.ndarray | None = None):
        """``keys``: those seen so far, ``S16`` of shape (n,), all different."""
        self._runs: list[np.ndarray] = [] if keys is None or not len(keys) else [np.sort(keys)]

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Adds ``keys``, ``S16`` of shape (n,).

        Returns a mask of shape (n,): which of them are seen for the first time.
        """
        new = np.zeros(len(keys), bool)
        new[np.unique(keys, return_index=True)[1]] = True
        for run in self._runs:
            at = np.searchsorted(run, keys)
            new &= run[np.minimum(at, len(run) - 1)] != keys
        if new.any():
            self._runs.append(np.sort(keys[new]))
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            two = np.concatenate([self._runs.pop(), self._runs.pop()])
            self._runs.append(
                np.sort(two, kind="stable")
            )  # which merges sorted runs in linear time
        return new
