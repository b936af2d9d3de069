"""What every corpus is made of: blocks of a source, rows or whole files, and the documents in them.

    source  --blocks-->  Block  --documents_of-->  Document

Cutting a source into blocks is cheap and happens in one process, in a fixed order. Everything that
costs time (parsing, cleaning) happens to a block by itself, in whichever process has a core free.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from almostgpt.errors import UserError

BLOCK_BYTES = 1 << 20  # rows are handed on in blocks of about this size
BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """A piece of text that stands for itself."""

    name: str  # of its file or dataset, the same on every machine
    text: str
    row: int | None = None  # its line, row or article there, from 1; None: the file is the document

    @property
    def where(self) -> str:
        """For messages."""
        return self.name if self.row is None else f"{self.name}, row {self.row}"


@dataclass(frozen=True)
class Block:
    """A stretch of a source, read but not yet understood."""

    file: str  # for messages: the path, or the address of the dataset
    name: str  # for Document.name
    content: bytes  # one file, whole, or rows as JSON lines
    first: int | None = None  # number of the first row; None: one file, whole
    unit: str = "row"  # what a row is called: line | row | article
    size: int = 0  # bytes of the source that went into it, for the progress


class Corpus:
    """A kind of text: where it is found, and how it is cleaned. Each kind overrides what differs."""

    columns: tuple[str, ...] = ("text",)  # names of the column with the text; the first present one
    also: tuple[str, ...] = ()  # columns that from_row reads besides, where they are present
    hub: str | None = None  # OWNER/NAME[/CONFIG] on the Hugging Face hub
    # Formats by file name, before those by suffix; such files are taken from a folder, too.
    formats: dict[str, str] = {}
    unit: str | None = None  # what gather makes of rows; None: they stay as they are

    def clean(self, text: str) -> str:
        """The document in a raw text; empty if there is none. Must take any text whatever."""
        return text

    def from_file(self, name: str, content: bytes) -> str:
        """The document in a file that is one text. ``UnicodeDecodeError`` if it is no text."""
        return self.clean(content.decode("utf-8"))

    def from_row(self, row: dict[str, Any], column: str) -> str:
        """The document in a row, whose ``column`` holds a text."""
        return self.clean(row[column])

    def gather(self, texts: Iterator[str]) -> Iterator[str]:
        """The raw texts of rows that belong together as one; called only where ``unit`` is set."""
        return texts


class BuiltIn(Corpus, ABC):
    """A corpus that brings its own text and needs no ``data.path``."""

    @abstractmethod
    def blocks(self, cache: Path) -> Iterator[Block]:
        """Whole files, in a fixed order. ``cache`` keeps what is downloaded."""


def documents_of(block: Block, corpus: Corpus, column: str | None) -> Iterator[Document]:
    """The documents of a block, cleaned; empty ones, too.

    Raises ``UserError`` that names file and row for what is not the text that it should be.
    """
    if block.first is None:
        try:
            yield Document(block.name, corpus.from_file(block.name, block.content))
        except UnicodeDecodeError as error:
            raise UserError(f"{block.file}: {not_utf8(error)}") from error
        return
    for number, line in enumerate(block.content.split(b"\n"), block.first):
        if line and not line.isspace():
            try:
                yield Document(block.name, _cleaned(parse_row(line), corpus, column), number)
            except UserError as error:
                raise UserError(f"{block.file}, {block.unit} {number}: {error}") from error


def parse_row(line: bytes) -> dict[str, Any]:
    """A JSON object; ``UserError`` for anything else."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(error)) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"damaged JSON: {error}; mend the row or delete it") from error
    if not isinstance(row, dict):
        whole = " (one JSON array must be rewritten as JSON lines, by jq -c '.[]' for one)"
        raise UserError(f"not a JSON object{whole if line.lstrip()[:1] == b'[' else ''}")
    return row


def raw_text(row: dict[str, Any], corpus: Corpus, wanted: str | None) -> tuple[str, str]:
    """The column of the text, and the text as it is; ``UserError`` if there is none to find."""
    column = choose_column(list(row), corpus, wanted)
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"its {column!r} is {_kind(text)}, not a text; name the column of the texts with "
            "data.column"
        )
    return column, text or ""  # a missing value is an empty text: both are dropped


def _cleaned(row: dict[str, Any], corpus: Corpus, wanted: str | None) -> str:
    column, text = raw_text(row, corpus, wanted)
    text = corpus.from_row({**row, column: text}, column)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell what UTF-8 cannot hold
        raise UserError(f"not valid Unicode: a lone surrogate at position {error.start}") from error
    return text


def choose_column(names: list[str], corpus: Corpus, wanted: str | None) -> str:
    """The column with the text: the ``wanted`` one, or a name that the corpus is known to use."""
    for column in corpus.columns if wanted is None else (wanted,):
        if column in names:
            return column
    if wanted is None and len(names) == 1:
        return names[0]
    looked = ", ".join(corpus.columns) if wanted is None else repr(wanted)
    raise UserError(
        f"no column {looked}; it has {', '.join(names[:20]) or 'none'}. Name the one with the text "
        "with data.column"
    )


def rows_in_blocks(
    rows: Iterable[dict[str, Any]],
    file: str,
    name: str,
    corpus: Corpus,
    column: str | None,
    position: Callable[[], int],
) -> Iterator[Block]:
    """Rows as JSON lines in blocks; ``position()`` says how many bytes of the source were read."""
    if corpus.unit is not None:
        gathered = corpus.gather(_raw_texts(rows, file, corpus, column))
        rows = ({column or corpus.columns[0]: text} for text in gathered)
    unit = corpus.unit or "row"
    lines: list[bytes] = []
    first, number, length, before = 1, 0, 0, 0
    for number, row in enumerate(rows, 1):
        lines.append(_json_line(row))
        length += len(lines[-1])
        if length >= BLOCK_BYTES:
            now = position()
            yield Block(file, name, b"\n".join(lines), first, unit, now - before)
            lines, first, length, before = [], number + 1, 0, now
    if lines:
        yield Block(file, name, b"\n".join(lines), first, unit, position() - before)


def _raw_texts(
    rows: Iterable[dict[str, Any]], file: str, corpus: Corpus, column: str | None
) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        try:
            yield raw_text(row, corpus, column)[1]
        except UserError as error:
            raise UserError(f"{file}, row {number}: {error}") from error


def _json_line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate; escaped it is refused later, by its row
        return json.dumps(row).encode("ascii")


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong, and where."""
    return (
        f"not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start} "
        f"({error.reason}); convert the file to UTF-8 or leave it out"
    )


def _kind(value: object) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return kinds.get(type(value), "an object")
