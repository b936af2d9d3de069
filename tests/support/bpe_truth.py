"""Byte-pair encoding as it is defined: a pass over all of the text for each merge."""

from collections import Counter
from collections.abc import Iterable

import regex

from almostgpt.data.bpe import PATTERNS


def chunks_of(texts: Iterable[str], pattern: str) -> Counter[bytes]:
    found = regex.compile(PATTERNS.get(pattern, pattern))
    return Counter(chunk.encode() for text in texts for chunk in found.findall(text))


def merges_by_definition(chunks: Counter[bytes], count: int) -> list[tuple[int, int]]:
    """Up to ``count`` merges: of the most frequent pairs of a time, the one of the smaller ids."""
    words = [(list(chunk), times) for chunk, times in chunks.items()]
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, times in words:
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += times
        if not pairs:
            break
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        words = [(merged(word, merges[-1], 255 + len(merges)), times) for word, times in words]
    return merges


def merged(word: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """``token`` for ``pair`` wherever it is, from left to right."""
    result, i = [], 0
    while i < len(word):
        here = tuple(word[i : i + 2]) == pair
        result.append(token if here else word[i])
        i += 2 if here else 1
    return result


def tokens_of(merges: list[tuple[int, int]]) -> list[bytes]:
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens
