"""Models of SentencePiece (``tokenizer.model``), by the package sentencepiece."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from almostgpt.data.tokenizer_base import Tokenizer, unicode_bytes
from almostgpt.errors import UserError

SPACE = "\u2581"  # ▁, which stands for a space in the pieces
# What a model must give back to be lossless: spaces in a row and at the ends, compatibility characters
# (which Unicode's NFKC replaces), line breaks, and a character that hardly a vocabulary has.
PROBE = " a  b\t\n\nﬁ①ｱ\u00a0e\u0301\U0001f9ff "


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model that gives every text back: its text unchanged, its bytes as a fall-back.

    As elsewhere in its world, ``▁`` in a text is taken for a space. Where the model puts a space before a
    text, ``decode`` takes it away again; ``decode_bytes``, also for the middle of a text, leaves it.
    Its control symbols stand for themselves only as ids; the end of a text is its ``</s>``.

    Raises:
        UserError: no package sentencepiece, damaged, or a model that loses text.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes):
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(
                "a SentencePiece model needs sentencepiece: pip install 'almostgpt[data]'"
            ) from error
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"damaged, or no SentencePiece model: {error}") from error
        self.vocab_size = self._processor.vocab_size()
        if not loaded or not self.vocab_size:
            raise UserError("damaged, or no SentencePiece model")
        end = self._processor.eos_id()
        self.end_of_text = end if end >= 0 else None
        if self.decode(self._processor.encode(PROBE)) != PROBE:
            raise UserError(
                "this SentencePiece model does not give its text back. Train one with "
                "--normalization_rule_name=identity --remove_extra_whitespaces=false "
                "--byte_fallback=true"
            )

    @classmethod
    def from_file(cls, file: Path) -> SentencePieceTokenizer:
        """The model in a file; ``UserError`` names it if it is none that is served."""
        try:
            return cls(file.read_bytes())
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
        except UserError as error:
            raise UserError(f"{file}: {error}") from error

    def encode_array(self, text: str) -> np.ndarray:
        unicode_bytes(text)
        return np.array(self._processor.encode(text), self.dtype)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        pieces = self._pieces
        return b"".join([pieces[id] for id in self._known(ids)])

    def decode(self, ids: Iterable[int]) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self._puts_a_space_first else text

    def settings(self) -> dict[str, Any]:
        return {"model": base64.b64encode(self.model).decode()}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> SentencePieceTokenizer:
        if not settings:
            raise UserError(
                "the sentencepiece tokenizer needs its model: name the file, or the folder with it"
            )
        try:
            return cls(base64.b64decode(settings["model"], validate=True))
        except (KeyError, TypeError, binascii.Error) as error:
            raise UserError("damaged: no settings of a sentencepiece tokenizer") from error

    @cached_property
    def _pieces(self) -> list[bytes]:
        """Of each id the bytes that it stands for."""
        processor = self._processor
        return [
            bytes([int(piece[3:5], 16)])  # <0x0A>
            if processor.is_byte(id)
            else piece.replace(SPACE, " ").encode()
            for id, piece in enumerate(map(processor.id_to_piece, range(self.vocab_size)))
        ]

    @cached_property
    def _puts_a_space_first(self) -> bool:
        return self.decode_bytes(self._processor.encode("a")) == b" a"


def find_model(folder: Path) -> Path | None:
    """The SentencePiece model in a folder, if it has one and no more."""
    models = sorted(folder.glob("*.model"))
    return models[0] if len(models) == 1 else None
