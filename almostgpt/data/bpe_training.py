"""Training a byte-level BPE: documents in, a :class:`BPETokenizer` out; ``csrc/bpe/`` does the work."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from almostgpt.data.bpe import (
    PATTERNS,
    WHOLE,
    BPETokenizer,
    checked_special_tokens,
    tiktoken_encoding,
)
from almostgpt.data.progress import progress_bar, say
from almostgpt.data.tokenizer_base import END_OF_TEXT, unicode_bytes
from almostgpt.errors import UserError

BYTES = 256


def train_bpe(
    documents_or_files: Iterable[str | bytes | Path],
    vocab_size: int,
    pattern: str = "gpt4",
    special_tokens: Sequence[str] = (END_OF_TEXT.decode(),),
    *,
    threads: int | None = None,
    progress: bool = False,
) -> BPETokenizer:
    """A vocabulary of the 256 bytes, of what the most frequent merges make, and of ``special_tokens``.

    Text streams by: what is held is each distinct chunk once, with its count. No pair goes over the
    border of a document. Of equally frequent pairs, the one of the smaller ids is merged first, so that
    the result depends on the text alone.

    Args:
        documents_or_files: each a ``str``, UTF-8 ``bytes``, or a ``Path`` to a file, which is one
            document. A byte that is not UTF-8 counts as a character of its own. An iterator is read once.
        vocab_size: ids in all. Where the text has fewer pairs to merge, the vocabulary is smaller.
        pattern: ``gpt2``, ``gpt4``, or a regular expression as the package `regex` and tiktoken have it.
            With one's own, a document is held as a whole, and splitting is a good ten times slower.
        special_tokens: texts with an id of their own, the last ones of the vocabulary.
        threads: that split and count; None: one for each core. They do not change the result.
        progress: whether to show bars and a summary on stderr.

    Raises:
        UserError: a bad argument, no text, too much of it (4 GiB of distinct chunks), a text that
            the pattern leaves out parts of, or no native library.
        OSError: a file that cannot be read.
    """
    special_tokens = checked_special_tokens(special_tokens)
    merges = _checked_merges(vocab_size, special_tokens)
    if threads is not None and threads < 1:
        raise UserError(f"threads is {threads}, but must be at least 1")
    tiktoken_encoding({bytes([byte]): byte for byte in range(BYTES)}, pattern, {})  # is it one?
    feed = _Feed(pattern, threads or len(_cores()))
    feed.add_all(_checked_items(documents_or_files), progress)
    if not feed.bytes:
        raise UserError("there is no text to train on: the documents are empty, or there are none")
    with progress_bar("merging", merges, progress) as advance:
        try:
            pairs, distinct = feed.trainer.train(merges, _steps(advance))
        except ValueError as error:  # its numbers have 32 bits
            raise UserError(f"too much text to train on: {error}; take a part of it") from error
    tokens = [bytes([byte]) for byte in range(BYTES)]
    for left, right in pairs:
        tokens.append(tokens[left] + tokens[right])
    say(
        f"{feed.documents:,} documents, {feed.bytes:,} bytes, {distinct:,} distinct chunks: "
        f"{len(pairs):,} merges" + (", and then no pair was left" if len(pairs) < merges else ""),
        progress,
    )
    return BPETokenizer(tokens, pattern, special_tokens)


class _Feed:
    """Gives documents to a trainer of ``almostgpt._bpe``, and counts them."""

    def __init__(self, pattern: str, threads: int):
        own = None if pattern in PATTERNS else _compiled(pattern)
        self.pattern, self._regex = pattern, own
        self.trainer = native().Trainer("gpt4" if own else pattern, threads)
        self._chunks: Counter[str] = Counter()  # of a pattern that the library does not know
        self.documents = self.bytes = 0

    def add_all(self, items: Iterable[str | bytes | Path], progress: bool) -> None:
        files = [item for item in items if isinstance(item, Path)] if _is_list(items) else []
        with progress_bar("counting", sum(map(_size, files)), progress and bool(files)) as advance:
            for item in items:
                self._add(item, _steps(advance))
                self.documents += 1
        self.trainer.add_chunks(
            {chunk.encode("utf-8", "surrogateescape"): n for chunk, n in self._chunks.items()}
        )

    def _add(self, item: str | bytes | Path, advance) -> None:
        if isinstance(item, Path) and self._regex is None:
            self.bytes += self.trainer.add_file(item, advance)
            return
        document = item.read_bytes() if isinstance(item, Path) else item
        if isinstance(document, str):
            document = unicode_bytes(document)
        self.bytes += len(document)
        if self._regex is None:
            self.trainer.add(document)
        else:
            # What is not UTF-8 becomes lone surrogates, a character a byte.
            self._split(document.decode("utf-8", "surrogateescape"))
            if isinstance(item, Path):
                advance(len(document))

    def _split(self, text: str) -> None:
        end = 0
        for match in self._regex.finditer(text):
            start = match.start()
            if start != end or match.end() == start:
                break
            end = match.end()
            self._chunks[match[0]] += 1
        if end < len(text):
            raise UserError(
                f"the pattern {self.pattern!r} leaves out {text[end : end + 20]!r} of a text{WHOLE}"
            )


def native():
    """The module ``almostgpt._bpe``; ``UserError`` where it was not built."""
    try:
        from almostgpt import _bpe
    except ImportError as error:
        raise UserError(
            "training a tokenizer needs almostgpt._bpe, which the install builds on Linux with a C++ "
            f"compiler, for one version of Python ({error}). Install g++ and then almostgpt anew, or "
            "train on another machine: a saved tokenizer needs no compiler"
        ) from error
    return _bpe


def _compiled(pattern: str):
    import regex  # tiktoken brings it

    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise UserError(
            f"the pattern is {pattern!r}: neither one of {', '.join(PATTERNS)} nor a regular "
            f"expression: {error}"
        ) from error


def _checked_merges(vocab_size: int, special_tokens: Sequence[str]) -> int:
    least = BYTES + len(special_tokens)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < least:
        raise UserError(
            f"vocab_size is {vocab_size}, but must be at least {least}: the 256 bytes"
            + (f" and {len(special_tokens)} special tokens" if special_tokens else "")
        )
    if vocab_size > 1 << 31:
        raise UserError(f"vocab_size is {vocab_size}, but at most 2^31 ids are possible")
    return vocab_size - least


def _checked_items(items: Iterable[str | bytes | Path]) -> Iterable[str | bytes | Path]:
    """``items``, each of which is what it should be."""
    if isinstance(items, Path):
        return [items]
    if isinstance(items, (str, bytes)):
        raise UserError(
            "train_bpe takes a list of documents, or of files as pathlib.Path; for one text, [text]"
        )
    return [*map(_checked, items)] if _is_list(items) else map(_checked, items)


def _checked(item: str | bytes | Path) -> str | bytes | Path:
    if not isinstance(item, (str, bytes, Path)):
        raise UserError(f"a document is str, bytes or pathlib.Path, not {type(item).__name__}")
    if isinstance(item, Path) and item.is_dir():
        raise UserError(f"{item}: a folder; name the files in it")
    return item


def _is_list(items: Iterable) -> bool:
    return isinstance(items, (list, tuple))


def _steps(advance):
    """From a count so far to what ``advance`` wants, the steps between."""
    last = 0

    def report(done: int) -> None:
        nonlocal last
        advance(done - last)
        last = done

    return report


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # reading it will say what is wrong


def _cores() -> Iterable[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)
