"""Byte-level BPE with a vocabulary of one's own: what :func:`train_bpe` gives.

Text is split into chunks by a pattern; within a chunk, bytes are put together by the merges that
training found (Sennrich et al. 2016, on bytes as in GPT-2). tiktoken encodes: of the two neighbours that
make the token of the lowest id, it merges the first, until none make one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from almostgpt.data.huggingface import TOKENIZER_JSON, byte_level
from almostgpt.data.token_bytes import character_of_byte
from almostgpt.data.tokenizer_base import END_OF_TEXT, Tokenizer, unicode_bytes
from almostgpt.errors import UserError
from almostgpt.files import write_text

# Ways to split text, by name. A user's own is a regular expression.
PATTERNS = {
    # https://github.com/openai/gpt-2/blob/master/src/encoder.py
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # cl100k_base of tiktoken up to 0.7; later ones keep white space at the end of a text together.
    "gpt4": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
}
RANKS_FILE = "tokenizer.tiktoken"  # a line a token: its bytes in base64, and its id

Pair = tuple[bytes, bytes]


class BPETokenizer(Tokenizer):
    """A byte-level BPE.

    ``save`` writes two files more, for others: ``tokenizer.tiktoken``, the ranks as tiktoken loads them
    (``tiktoken.load.load_tiktoken_bpe``), and ``tokenizer.json``, which Hugging Face's libraries read.

    Args:
        tokens: the bytes of each token by its id, in the order of the merges; the 256 bytes are
            among them.
        pattern: a name in ``PATTERNS``, or a regular expression.
        special_tokens: they get the ids that follow. ``<|endoftext|>``, if among them, ends a text.

    Raises:
        UserError: no such vocabulary, or a pattern that tiktoken does not know.
    """

    name = "bpe"

    def __init__(
        self,
        tokens: Sequence[bytes],
        pattern: str = "gpt4",
        special_tokens: Sequence[str] = (END_OF_TEXT.decode(),),
    ):
        self.tokens, self.pattern = tuple(tokens), pattern
        self.special_tokens = checked_special_tokens(special_tokens)
        self.ranks = {token: id for id, token in enumerate(self.tokens)}
        if len(self.ranks) < len(self.tokens) or b"" in self.ranks:
            raise UserError("a vocabulary of BPE has tokens that are empty, or more than once")
        if any(bytes([byte]) not in self.ranks for byte in range(256)):
            raise UserError("a vocabulary of BPE must hold each of the 256 bytes as a token")
        for special in self.special_tokens:
            if special.encode() in self.ranks:
                raise UserError(
                    f"the special token {special!r} is an ordinary token, too; choose another text"
                )
        self.vocab_size = len(self.tokens) + len(self.special_tokens)
        self._bytes_of = [*self.tokens, *(special.encode() for special in self.special_tokens)]
        end = END_OF_TEXT.decode()
        self.end_of_text = self.special_ids.get(end)
        self._encoding = tiktoken_encoding(self.ranks, pattern, self.special_ids)

    @property
    def special_ids(self) -> dict[str, int]:
        """The id of each special token."""
        return {special: len(self.tokens) + i for i, special in enumerate(self.special_tokens)}

    @cached_property
    def merges(self) -> list[Pair]:
        """The two tokens that each merge puts together, in order."""
        return merges_of(self.ranks)

    def encode_array(self, text: str) -> np.ndarray:
        size = len(unicode_bytes(text))  # tiktoken itself would fail on a lone surrogate
        ids = self._encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)
        if self.pattern not in PATTERNS and size != sum(len(self._bytes_of[id]) for id in ids):
            raise UserError(f"the pattern {self.pattern!r} leaves out parts of the text{WHOLE}")
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes_of[id] for id in self._known(ids)])

    def settings(self) -> dict[str, Any]:
        return {
            "pattern": self.pattern,
            "special_tokens": list(self.special_tokens),
            "tokens": [base64.b64encode(token).decode() for token in self.tokens],
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> BPETokenizer:
        if not settings:
            raise UserError(
                "the bpe tokenizer is one that was trained: name the folder that `almostgpt tokenizer "
                "train` wrote"
            )
        pattern, specials = settings.get("pattern"), settings.get("special_tokens")
        tokens = settings.get("tokens")
        if not isinstance(pattern, str) or not _is_texts(specials) or not _is_texts(tokens):
            raise UserError("damaged: no settings of a bpe tokenizer")
        try:
            return cls(
                [base64.b64decode(token, validate=True) for token in tokens], pattern, specials
            )
        except (binascii.Error, ValueError) as error:
            raise UserError(f"damaged: {error}") from error

    def save(self, folder: str | Path) -> Path:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = (f"{base64.b64encode(token).decode()} {id}\n" for token, id in self.ranks.items())
        write_text(folder / RANKS_FILE, "".join(lines))
        write_text(folder / TOKENIZER_JSON, as_hugging_face(self).to_str(pretty=True))
        return super().save(folder)  # last: it is what the folder is known by


WHOLE = "; let its last alternative match what the others do not: PATTERN|[\\s\\S]"


def checked_special_tokens(special_tokens: Sequence[str]) -> tuple[str, ...]:
    """Distinct texts; ``UserError`` for anything else."""
    if isinstance(special_tokens, str):
        raise UserError(f"special tokens are a list of texts, not the text {special_tokens!r}")
    special_tokens = tuple(special_tokens)
    for special in special_tokens:
        if not isinstance(special, str) or not special:
            raise UserError(f"a special token is a text that is not empty, not {special!r}")
        unicode_bytes(special)
    if len(set(special_tokens)) < len(special_tokens):
        raise UserError(f"a special token is given twice: {', '.join(special_tokens)}")
    return special_tokens


def tiktoken_encoding(ranks: Mapping[bytes, int], pattern: str, special_ids: Mapping[str, int]):
    """The ``tiktoken.Encoding``; ``UserError`` for a pattern that it does not know."""
    try:
        import tiktoken
    except ImportError as error:
        raise UserError("the bpe tokenizer needs tiktoken: pip install tiktoken") from error
    try:
        return tiktoken.Encoding(
            "almostgpt",
            pat_str=PATTERNS.get(pattern, pattern),
            mergeable_ranks=dict(ranks),
            special_tokens=dict(special_ids),
        )
    except ValueError as error:  # of its regular expressions, which are those of Rust
        raise UserError(
            f"the pattern is {pattern!r}: neither one of {', '.join(PATTERNS)} nor a regular "
            f"expression: {error}"
        ) from error


def as_hugging_face(tokenizer: BPETokenizer):
    """The same as a ``tokenizers.Tokenizer``; ``UserError`` for a pattern that it does not know."""
    from tokenizers import AddedToken, Regex, pre_tokenizers

    built = byte_level(byte_pairs(tokenizer.ranks, tokenizer.merges), split=False)
    try:
        split = Regex(PATTERNS.get(tokenizer.pattern, tokenizer.pattern))
    except Exception as error:  # tokenizers has no type of its own
        raise UserError(
            f"the pattern {tokenizer.pattern!r} is none to the library tokenizers, for which "
            f"{TOKENIZER_JSON} is written: {error}"
        ) from error
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), built.pre_tokenizer]
    )
    built.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in tokenizer.special_tokens]
    )
    return built


def byte_pairs(ranks: Mapping[bytes, int], merges: Iterable[Pair]):
    """The model of ``tokenizers``, whose tokens are written in GPT-2's alphabet of bytes."""
    from tokenizers import models

    written = character_of_byte()

    def shown(token: bytes) -> str:
        return "".join(written[byte] for byte in token)

    ids = {shown(token): id for token, id in ranks.items()}
    return models.BPE(ids, [(shown(left), shown(right)) for left, right in merges])


def merges_of(ranks: Mapping[bytes, int]) -> list[Pair]:
    """The merges of a byte-level BPE, in order, from its tokens and their ranks.

    A token was made by the last merge of itself: apply to its bytes all merges of lower rank, and two
    parts are left.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = [bytes([byte]) for byte in token]
            while len(parts) > 2:
                merged = [left + right for left, right in zip(parts, parts[1:], strict=False)]
                at = min(range(len(merged)), key=lambda i: ranks.get(merged[i], rank))
                parts[at : at + 2] = [merged[at]]
            merges.append((parts[0], parts[1]))
    return merges


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
