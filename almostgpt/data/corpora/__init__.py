"""Where documents come from: a corpus by its name, files by their path, or a dataset of the hub.

Every source is streamed, in a fixed order; a corpus is never held in memory, only its largest
document. A kind of text is a class and one entry in :data:`CORPORA`; what is done to all kinds alike
(normalisation, lengths, duplicates) is in ``almostgpt/data/filters.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from almostgpt.config import DataConfig
from almostgpt.data.corpora.base import Block, BuiltIn, Corpus, Document, documents_of
from almostgpt.data.corpora.cnn import CNN
from almostgpt.data.corpora.enron import Enron
from almostgpt.data.corpora.files import find_files, read_text
from almostgpt.data.corpora.gutenberg import Gutenberg
from almostgpt.data.corpora.hub import SCHEME, hub_blocks, parse_address
from almostgpt.data.corpora.plain import Plain
from almostgpt.data.corpora.shakespeare import TinyShakespeare
from almostgpt.data.corpora.stdlib import StandardLibrary
from almostgpt.data.corpora.tables import blocks_of_file
from almostgpt.data.corpora.web import FineWebEdu, OpenWebText
from almostgpt.data.corpora.wikipedia import Wikipedia
from almostgpt.data.corpora.wikitext import WikiText
from almostgpt.errors import UserError, not_one_of

__all__ = [
    "CORPORA",
    "Block",
    "Corpus",
    "Document",
    "Source",
    "documents_of",
    "open_source",
    "read_documents",
    "read_text",
]

CORPORA: dict[str, Corpus] = {
    "stdlib": StandardLibrary(),
    "shakespeare": TinyShakespeare(),
    "text": Plain(),
    "gutenberg": Gutenberg(),
    "cnn": CNN(),
    "enron": Enron(),
    "openwebtext": OpenWebText(),
    "wikipedia": Wikipedia(),
    "wikitext": WikiText(),
    "fineweb-edu": FineWebEdu(),
}


@dataclass(frozen=True)
class Source:
    """Text that was found, ready to be read."""

    kind: str  # its key in CORPORA
    column: str | None  # data.column
    label: str  # for messages: where it is
    size: int | None  # bytes in all; None: not known before the end
    blocks: Callable[[], Iterator[Block]]  # from the beginning, the same ones every time

    @property
    def corpus(self) -> Corpus:
        """What the text is."""
        return CORPORA[self.kind]


def open_source(data: DataConfig, cache: Path) -> Source:
    """What ``data.path`` and ``data.corpus`` name. A path with a built-in corpus is plain text.

    ``cache`` keeps what is downloaded. Raises ``UserError`` for what is not there, and for
    ``data.column`` where the source has no columns.
    """
    if data.corpus not in CORPORA:
        raise UserError(f"data.corpus is {not_one_of(data.corpus, CORPORA)}")
    kind, path = data.corpus, data.path
    corpus = CORPORA[kind]
    if isinstance(corpus, BuiltIn) and path is None:
        if data.column is not None:
            raise UserError(
                f"data.column is {data.column!r}, but data.corpus={kind} has no columns"
            )
        return Source(kind, None, f"data.corpus={kind}", None, lambda: corpus.blocks(cache))
    if isinstance(corpus, BuiltIn):
        kind, corpus = "text", CORPORA["text"]
    if path is None:
        if corpus.hub is None:
            raise UserError(f"data.corpus={kind} needs data.path: files, or hf://OWNER/NAME")
        path = SCHEME + corpus.hub
    if path.startswith(SCHEME):
        parse_address(path)
        return Source(kind, data.column, path, None, lambda: hub_blocks(path, corpus, data.column))
    files = find_files(path, corpus)
    if data.column is not None and all(file.format in ("text", "lines") for file in files):
        raise UserError(f"data.column is {data.column!r}, but {path} is text, which has no columns")

    def blocks() -> Iterator[Block]:
        for file in files:
            yield from blocks_of_file(file.path, file.name, file.format, corpus, data.column)

    return Source(kind, data.column, path, sum(file.size for file in files), blocks)


def read_documents(data: DataConfig, cache: Path) -> Iterator[Document]:
    """The documents of ``data``, cleaned as their corpus is; those without text are left out.

    Raises ``UserError`` for whatever cannot be read, by file and row, and if there is no text at all.
    """
    source = open_source(data, cache)
    empty = True
    for block in source.blocks():
        for document in documents_of(block, source.corpus, source.column):
            if document.text:
                empty = False
                yield document
    if empty:
        raise UserError(f"{source.label}: there is no text in it; data.path names text to train on")
