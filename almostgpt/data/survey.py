"""One pass over the documents before they are encoded: how much, which hash, which alphabet."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from almostgpt.config import DataConfig
from almostgpt.data.corpora import Document, read_documents
from almostgpt.data.tokenizer import CharTokenizer
from almostgpt.errors import UserError


@dataclass(frozen=True)
class Survey:
    """What one pass tells."""

    documents: int
    characters: int
    sha256: str  # of names and texts, in order
    alphabet: str  # the characters that occur, sorted; gathered for the char tokenizer only
    lowest: float  # the lowest and the highest place of a document
    highest: float

    def val_limit(self, val_fraction: float) -> float:
        """Documents whose :func:`place` is below this validate: at least one, and never all."""
        if self.documents < 2:
            raise UserError(
                "data.split=document needs two documents or more, and the text is one; "
                "use data.split=tail"
            )
        return min(max(val_fraction, math.nextafter(self.lowest, 1)), self.highest)


def survey_documents(data: DataConfig, cache: Path) -> Survey:
    """Reads all documents of ``data`` once; ``UserError`` for what cannot be read."""
    documents, characters, lowest, highest = 0, 0, 1.0, 0.0
    digest, alphabet = hashlib.sha256(), set()
    for document in read_documents(data, cache):
        own = _digest(document)
        digest.update(own)
        documents += 1
        characters += len(document.text)
        lowest, highest = min(lowest, _fraction(own)), max(highest, _fraction(own))
        if data.tokenizer == CharTokenizer.name:
            alphabet.update(document.text)
    text = "".join(sorted(alphabet))
    return Survey(documents, characters, digest.hexdigest(), text, lowest, highest)


def place(document: Document) -> float:
    """A number in [0, 1) from a hash of name and text.

    It does not depend on the other documents: whoever adds some moves none to the other split.
    """
    return _fraction(_digest(document))


def _digest(document: Document) -> bytes:
    # The length keeps ("ab", "c") and ("a", "bc") apart; names may hold bytes that are not UTF-8.
    name = document.name.encode("utf-8", "surrogateescape")
    return hashlib.sha256(len(name).to_bytes(8, "little") + name + document.text.encode()).digest()


def _fraction(digest: bytes) -> float:
    return int.from_bytes(digest[:6], "little") / 2**48  # 48 bits are exact in a float
