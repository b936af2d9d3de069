"""How the formats of files become blocks: text, lines of text, JSON lines, csv, parquet.

Every table becomes JSON lines on its way, so that whoever reads a block knows one kind of row. JSON
lines themselves go through as they are, not even parsed: that is left to many processes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from almostgpt.data.corpora.base import (
    BLOCK_BYTES,
    BOM,
    Block,
    Corpus,
    choose_column,
    not_utf8,
    parse_row,
    rows_in_blocks,
)
from almostgpt.data.corpora.compressed import DAMAGE, Opened, damaged, opened
from almostgpt.errors import UserError

LARGEST_ROW = 1 << 28  # bytes; what has longer ones is not what its name says
PARQUET_ROWS = 64  # rows unpacked at a time

Row = dict[str, Any]


def blocks_of_file(
    file: Path, name: str, format: str, corpus: Corpus, column: str | None
) -> Iterator[Block]:
    """The blocks of a file in one of :data:`FORMATS`, or ``text``: the file is one document.

    Raises ``UserError`` that names the file, and the row where there is one, for whatever cannot be
    read.
    """
    with opened(file) as source:
        if format == "text":
            yield _whole(file, name, source)
        elif format == "jsonl" and corpus.unit is None:
            yield from _raw_lines(file, name, source)
        else:
            rows = FORMATS[format](file, source, corpus, column)
            yield from rows_in_blocks(rows, str(file), name, corpus, column, source.position)


def _whole(file: Path, name: str, source: Opened) -> Block:
    try:
        content = source.stream.read()
    except DAMAGE as error:
        raise damaged(file, error) from error
    return Block(str(file), name, content, size=source.position())


def _raw_lines(file: Path, name: str, source: Opened) -> Iterator[Block]:
    """Blocks that end where a line does; what is in the lines is not looked at."""
    first, before = 1, 0
    while True:
        try:
            content = source.stream.read(BLOCK_BYTES)
            rest = source.stream.readline(LARGEST_ROW)
        except DAMAGE as error:
            raise damaged(file, error, f" after line {first - 1}") from error
        if not content:
            return
        if len(rest) == LARGEST_ROW:
            raise _too_long(file, f"line {first + content.count(10)}")
        content += rest
        now = source.position()
        shown = content.removeprefix(BOM) if first == 1 else content
        yield Block(str(file), name, shown, first, "line", now - before)
        first, before = first + content.count(b"\n"), now


# ---------------------------------------------------------------- rows, where they are parsed here


def _lines(file: Path, source: Opened) -> Iterator[tuple[int, bytes]]:
    """Every line with its number, from 1; without a byte order mark."""
    number = 0
    try:
        while line := source.stream.readline(LARGEST_ROW):
            number += 1
            if len(line) == LARGEST_ROW:
                raise _too_long(file, f"line {number}")
            yield number, line.removeprefix(BOM) if number == 1 else line
    except DAMAGE as error:
        raise damaged(file, error, f" after line {number}") from error


def _text_rows(file: Path, source: Opened, corpus: Corpus, column: str | None) -> Iterator[Row]:
    """Every line of a text as a row of its own, for a corpus that gathers them."""
    for number, line in _lines(file, source):
        try:
            yield {corpus.columns[0]: line.decode("utf-8")}
        except UnicodeDecodeError as error:
            raise UserError(f"{file}, line {number}: {not_utf8(error)}") from error


def _json_rows(file: Path, source: Opened, corpus: Corpus, column: str | None) -> Iterator[Row]:
    for number, line in _lines(file, source):
        if not line.isspace():
            try:
                yield parse_row(line)
            except UserError as error:
                raise UserError(f"{file}, line {number}: {error}") from error


def _csv_rows(file: Path, source: Opened, corpus: Corpus, column: str | None) -> Iterator[Row]:
    """The first row names the columns; fields may be quoted, and quoted ones hold line ends."""
    separator = "\t" if ".tsv" in file.suffixes else ","
    text = io.TextIOWrapper(source.stream, "utf-8-sig", newline="")
    reader = csv.reader(_csv_lines(file, text), delimiter=separator, strict=True)
    header, wanted, number = None, {}, 0
    try:
        while True:
            with _large_fields():
                fields = next(reader, None)
            if fields is None:
                break
            if header is None:
                header = fields
                wanted = {
                    name: header.index(name) for name in _columns(file, header, corpus, column)
                }
            elif fields:  # not a blank line
                number += 1
                if len(fields) != len(header):
                    raise UserError(
                        f"{file}, row {number}: {len(fields)} fields instead of the {len(header)} "
                        f"of its first line (line {reader.line_num}); mend the row or delete it"
                    )
                yield {name: fields[at] for name, at in wanted.items()}
    except csv.Error as error:
        hint = (
            "a quote that is not closed?" if "limit" in str(error) or "end of" in str(error) else ""
        )
        raise UserError(
            f"{file}, row {number + 1} (line {reader.line_num}): damaged csv: {error}; "
            f"{hint or 'mend the row or delete it'}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, after row {number}: {not_utf8(error)}") from error
    except DAMAGE as error:
        raise damaged(file, error, f" after row {number}") from error
    finally:
        text.detach()  # else the wrapper would close the stream, which is not its own


def _csv_lines(file: Path, text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(LARGEST_ROW):
        if len(line) == LARGEST_ROW:
            raise _too_long(file, "a line")
        yield line


@contextmanager
def _large_fields() -> Iterator[None]:
    """csv stops at fields above 128 KiB, by a limit that the whole process shares."""
    before = csv.field_size_limit(LARGEST_ROW)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet_rows(file: Path, source: Opened, corpus: Corpus, column: str | None) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{file}: parquet files need pyarrow: pip install 'almostgpt[data]'"
        ) from error
    number = 0
    try:
        parquet = pyarrow.parquet.ParquetFile(source.stream, buffer_size=BLOCK_BYTES)
        columns = _columns(file, parquet.schema_arrow.names, corpus, column)
        for batch in parquet.iter_batches(PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                yield row
                number += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, after row {number}: {not_utf8(error)}") from error
    except (pyarrow.ArrowException, *DAMAGE) as error:
        raise damaged(file, error, f" after row {number}") from error


def _columns(file: Path, names: list[str], corpus: Corpus, column: str | None) -> list[str]:
    """The columns to read: that of the texts, and those that the corpus reads besides."""
    try:
        chosen = choose_column(names, corpus, column)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return [chosen, *(name for name in corpus.also if name in names and name != chosen)]


def _too_long(file: Path, what: str) -> UserError:
    return UserError(
        f"{file}: {what} is longer than {LARGEST_ROW >> 20} MiB: not the format that its name says?"
    )


FORMATS: dict[str, Callable[[Path, Opened, Corpus, str | None], Iterator[Row]]] = {
    "lines": _text_rows,
    "jsonl": _json_rows,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
}
SUFFIXES = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
