"""Text to token ids and back: the kinds of tokenizers, and how one is found by name or folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from almostgpt.data.bpe import BPETokenizer
from almostgpt.data.bpe_training import train_bpe
from almostgpt.data.huggingface import TOKENIZER_JSON, HuggingFaceTokenizer
from almostgpt.data.sentence_piece import SentencePieceTokenizer, find_model
from almostgpt.data.tokenizer_base import (
    END_OF_TEXT,
    FILE_NAME,
    Tokenizer,
    read_settings,
    unicode_bytes,
)
from almostgpt.errors import UserError, not_one_of
from almostgpt.files import expand

__all__ = [
    "FILE_NAME",
    "TOKENIZERS",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "GPT2Tokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "load_tokenizer",
    "train_bpe",
]


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
        return np.frombuffer(unicode_bytes(text), np.uint8).astype(self.dtype)

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
        unicode_bytes(text)  # tiktoken itself would fail on a lone surrogate with a traceback
        # With nothing disallowed and nothing allowed, tiktoken reads special tokens as plain text.
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(self._known(ids))

    @property
    def ranks(self) -> dict[bytes, int]:
        """The id of every token but the special one, which is also the order of the merges."""
        return {self._encoding.decode_single_token_bytes(id): id for id in range(50256)}


TOKENIZERS: dict[str, type[Tokenizer]] = {
    kind.name: kind
    for kind in (
        CharTokenizer,
        ByteTokenizer,
        GPT2Tokenizer,
        BPETokenizer,
        HuggingFaceTokenizer,
        SentencePieceTokenizer,
    )
}


def load_tokenizer(name_or_folder: str | Path) -> Tokenizer:
    """The tokenizer of a name (``byte``, ``gpt2``) or the one in a folder: ours, a Hugging Face one, or
    a model of SentencePiece, which may also be named itself (``FILE.model``).

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
    if folder.suffix == ".model" and folder.is_file():
        return SentencePieceTokenizer.from_file(folder)
    if not folder.is_dir():
        raise UserError(f"tokenizer: neither a folder nor a name: {not_one_of(name, TOKENIZERS)}")
    file = folder / FILE_NAME
    if not file.exists() and (folder / TOKENIZER_JSON).is_file():
        return HuggingFaceTokenizer.from_folder(folder)
    if not file.exists() and (model := find_model(folder)):
        return SentencePieceTokenizer.from_file(model)
    kind = read_settings(file).get("kind")
    if kind not in list(TOKENIZERS):  # a list: it may be unhashable
        raise UserError(f"{file}: its kind is {not_one_of(kind, TOKENIZERS)}")
    return TOKENIZERS[kind].load(folder)


def build_tokenizer(name_or_folder: str | Path, texts: Iterable[str]) -> Tokenizer:
    """Like :func:`load_tokenizer`, and ``char`` takes its vocabulary from ``texts``."""
    if str(name_or_folder) == CharTokenizer.name:
        return CharTokenizer(set().union(*texts))
    return load_tokenizer(name_or_folder)


def _code_points(text: str) -> np.ndarray:
    """The Unicode code points of ``text``, uint32, shape (len(text),)."""
    return np.frombuffer(unicode_bytes(text, "utf-32-le"), "<u4")
