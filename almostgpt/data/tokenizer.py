"""Text to token ids and back.

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

from almostgpt.config import not_one_of
from almostgpt.errors import UserError
from almostgpt.files import expand, replacing

# Not "tokenizer.json": that name belongs to the format of Hugging Face tokenizers.
FILE_NAME = "almostgpt_tokenizer.json"
END_OF_TEXT = b"<|endoftext|>"


class Tokenizer(ABC):
    """What every tokenizer offers; a kind implements the two abstract methods."""

    name: ClassVar[str]  # the kind: its key in TOKENIZERS
    vocab_size: int  # ids are 0 .. vocab_size - 1
    end_of_text: int | None  # id that separates documents; None where the vocabulary has none

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
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; ``UserError`` for text that the vocabulary cannot express."""
        return self.encode_array(text).tolist()

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
        settings = _read_settings(file)
        if settings["kind"] != cls.name:
            raise UserError(f"{file}: holds a {settings['kind']} tokenizer, not {cls.name}")
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


class CharTokenizer(Tokenizer):
    """One id for each character of the training text, in the order of their code points."""

    name = "char"
    end_of_text = None

    def __init__(self, characters: Iterable[str]):
        """``characters``: a text, or anything that yields its characters; repeats do no harm."""
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise UserError("a character vocabulary needs a text, but the text is empty")
        self.vocab_size = len(self.characters)
        codes = _code_points(self.characters)
        # One entry more than the highest character: there every higher one of a text is looked up.
        self._id_of_code = np.full(int(codes[-1]) + 2, self.vocab_size, np.uint32)
        self._id_of_code[codes] = np.arange(self.vocab_size, dtype=np.uint32)

    def encode_array(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = self._id_of_code[np.minimum(codes, len(self._id_of_code) - 1)]
        unknown = ids == self.vocab_size
        if unknown.any():
            at = int(unknown.argmax())
            raise UserError(
                f"the character {text[at]!r} (U+{ord(text[at]):04X}, position {at}) is not in the "
                f"vocabulary: its {self.vocab_size} characters came from the training text. Leave "
                "the character out, or train with the byte or gpt2 tokenizer"
            )
        return ids.astype(self.dtype)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join([self.characters[i] for i in self._known(ids)]).encode()

    def settings(self) -> dict[str, Any]:
        return {"characters": self.characters}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> CharTokenizer:
        characters = settings.get("characters")
        if not isinstance(characters, str) or list(characters) != sorted(set(characters)):
            raise UserError("damaged: 'characters' is not a sorted text without repeats")
        return cls(characters)


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 as they are, and 256 for the end of a text."""

    name = "byte"
    vocab_size = 257
    end_of_text = 256

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(_bytes(text), np.uint8).astype(self.dtype)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([END_OF_TEXT if i == 256 else bytes((i,)) for i in self._known(ids)])


class GPT2Tokenizer(Tokenizer):
    """The byte-level BPE of GPT-2, by tiktoken, which downloads its tables once and caches them."""

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise UserError("the gpt2 tokenizer needs tiktoken: pip install tiktoken") from error
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise UserError(
                "the gpt2 tokenizer needs OpenAI's vocab.bpe and encoder.json, and they could not "
                f"be downloaded ({type(error).__name__}). Run once with a network, or set "
                "TIKTOKEN_CACHE_DIR to a folder that holds copies of them, named "
                "6d1cbeee0f20b3d9449abfede4726ed8212e3aee (vocab.bpe) and "
                "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 (encoder.json)"
            ) from error

    def encode_array(self, text: str) -> np.ndarray:
        _bytes(text)  # tiktoken itself would fail on a lone surrogate with a traceback
        # With nothing disallowed and nothing allowed, tiktoken reads special tokens as plain text.
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(self._known(ids))


TOKENIZERS: dict[str, type[Tokenizer]] = {
    kind.name: kind for kind in (CharTokenizer, ByteTokenizer, GPT2Tokenizer)
}


def load_tokenizer(name_or_folder: str | Path) -> Tokenizer:
    """The tokenizer of a name (``byte``, ``gpt2``) or the one saved in a folder.

    Raises ``UserError`` for an unknown name, a folder without a tokenizer or a damaged file, and
    for ``char``, whose vocabulary comes from a text.
    """
    name, folder = str(name_or_folder), expand(name_or_folder)
    if name == CharTokenizer.name:
        raise UserError(
            "the char tokenizer takes its vocabulary from a text: prepare one with "
            "data.tokenizer=char, or name a folder in which a tokenizer is saved"
        )
    if name in TOKENIZERS:
        return TOKENIZERS[name].from_settings({})
    if not folder.is_dir():
        raise UserError(f"tokenizer: neither a folder nor a name: {not_one_of(name, TOKENIZERS)}")
    return TOKENIZERS[_read_settings(folder / FILE_NAME)["kind"]].load(folder)


def build_tokenizer(name_or_folder: str | Path, texts: Iterable[str]) -> Tokenizer:
    """Like :func:`load_tokenizer`, and ``char`` takes its vocabulary from ``texts``."""
    if str(name_or_folder) == CharTokenizer.name:
        return CharTokenizer(set().union(*texts))
    return load_tokenizer(name_or_folder)


def _read_settings(file: Path) -> dict[str, Any]:
    """The JSON object of a tokenizer file, of a known ``kind``; ``UserError`` if it is none."""
    try:
        settings = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: no tokenizer can be read here: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file}: damaged, or not a tokenizer: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file}: damaged, or not a tokenizer: it holds no JSON object")
    if settings.get("kind") not in list(TOKENIZERS):  # a list: it may be unhashable
        raise UserError(f"{file}: its kind is {not_one_of(settings.get('kind'), TOKENIZERS)}")
    return settings


def _bytes(text: str, encoding: str = "utf-8") -> bytes:
    """``text`` in an encoding of Unicode, which only a lone surrogate can prevent."""
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not valid Unicode: a lone surrogate at position {error.start}"
        ) from error


def _code_points(text: str) -> np.ndarray:
    """The Unicode code points of ``text``, uint32, shape (len(text),)."""
    return np.frombuffer(_bytes(text, "utf-32-le"), "<u4")
