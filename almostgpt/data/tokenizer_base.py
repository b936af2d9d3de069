"""What every tokenizer offers, and the file it is saved in; ``tokenizer.py`` has the kinds.

A tokenizer is lossless: ``decode(encode(text)) == text``. Tokens are made of bytes, so a cut
between two tokens may fall inside a UTF-8 character; ``decode`` then shows U+FFFD and never raises.
Ordinary text never becomes a special token, whatever it spells.
"""

from __future__ import annotations

import json
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from almostgpt.data.chat_template import ChatTemplate
from almostgpt.errors import UserError
from almostgpt.files import replacing

# Not "tokenizer.json": that name belongs to the format of Hugging Face tokenizers.
FILE_NAME = "almostgpt_tokenizer.json"
END_OF_TEXT = b"<|endoftext|>"


class Tokenizer(ABC):
    """What every tokenizer offers; a kind implements the two abstract methods."""

    name: ClassVar[str]  # the kind: its key in TOKENIZERS
    vocab_size: int  # ids are 0 .. vocab_size - 1
    end_of_text: int | None  # id that separates documents; None where the vocabulary has none
    begin: tuple[int, ...] = ()  # ids that every text begins with, where the model expects any
    chat_template: ChatTemplate | None = None  # how a conversation is written; None: not known

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """The ids of ``text``, shape (n,), in the smallest of uint16 and uint32 (``dtype``).

        Raises ``UserError`` for text that the vocabulary cannot express.
        """

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes that ``ids`` (list, array or 1-D tensor) stand for.

        Raises ``UserError`` for an id outside the vocabulary.
        """

    def settings(self) -> dict[str, Any]:
        """What :meth:`save` stores, JSON values only; equal kinds and settings mean equal ids."""
        return {}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Tokenizer:
        """The tokenizer that :meth:`settings` describes; ``UserError`` if it describes none."""
        return cls()

    def same_as(self, other: Tokenizer) -> bool:
        """Whether both give every text the same ids."""
        return (self.name, self.settings()) == (other.name, other.settings())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids by which a model says that its text, or its turn, is over."""
        return () if self.end_of_text is None else (self.end_of_text,)

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; ``UserError`` for text that the vocabulary cannot express."""
        return self.encode_array(text).tolist()

    def encode_from_start(self, text: str) -> list[int]:
        """:meth:`encode` for the beginning of a text: ``begin``, and the ids of what follows it."""
        return [*self.begin, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, U+FFFD for incomplete characters; ``UserError`` for a foreign id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> Path:
        """Writes ``almostgpt_tokenizer.json`` into ``folder`` (created if need be), atomically."""
        file = Path(folder) / FILE_NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as out:
            out.write(json.dumps({"kind": self.name, **self.settings()}, indent=1).encode() + b"\n")
        return file

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer saved in ``folder``; ``UserError`` if missing, damaged or another kind."""
        file = Path(folder) / FILE_NAME
        settings = read_settings(file)
        if settings.get("kind") != cls.name:
            raise UserError(f"{file}: holds a {settings.get('kind')} tokenizer, not {cls.name}")
        try:
            return cls.from_settings(settings)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error

    def _known(self, ids: Iterable[int]) -> list[int]:
        """``ids`` as a list of integers of the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else [operator.index(i) for i in ids]
        foreign = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if foreign is not None:
            raise UserError(
                f"token id {foreign} is not in the vocabulary of the {self.name} tokenizer "
                f"(0 to {self.vocab_size - 1})"
            )
        return ids


def read_settings(file: Path) -> dict[str, Any]:
    """The JSON object of a tokenizer file; ``UserError`` if it is none."""
    try:
        settings = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: no tokenizer can be read here: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file}: damaged, or not a tokenizer: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file}: damaged, or not a tokenizer: it holds no JSON object")
    return settings


def unicode_bytes(text: str, encoding: str = "utf-8") -> bytes:
    """``text`` in an encoding of Unicode, which only a lone surrogate can prevent."""
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not valid Unicode: a lone surrogate at position {error.start}"
        ) from error
