"""Where documents come from: a corpus by its name, or text files by their path.

Every reader streams ``Document``s in a fixed order and leaves the text as it is, byte for byte.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from almostgpt.config import DataConfig, not_one_of
from almostgpt.errors import UserError
from almostgpt.files import expand, replacing


class Document(NamedTuple):
    """A piece of text that stands for itself; ``name`` is the same on every machine."""

    name: str
    text: str


def read_documents(data: DataConfig, cache: Path) -> Iterator[Document]:
    """The documents of ``data.path`` or, without one, of ``data.corpus``.

    ``cache`` keeps what is downloaded. Raises ``UserError`` for whatever cannot be read, by name.
    """
    if data.path is not None:
        return read_path(expand(data.path))
    if data.corpus not in CORPORA:
        raise UserError(f"data.corpus is {not_one_of(data.corpus, CORPORA)}")
    return CORPORA[data.corpus](cache)


# ---------------------------------------------------------------- local text


def read_path(path: Path) -> Iterator[Document]:
    """One UTF-8 text file, or every ``*.txt`` below a folder in the order of their paths."""
    if path.is_dir():
        files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*.txt"))
    elif path.exists():
        files = [(path.name, path)]
    else:
        raise UserError(f"{path}: no such file or folder; data.path names text to train on")
    documents = (Document(name, read_text(file)) for name, file in files if file.is_file())
    empty = True
    for document in documents:
        if document.text:
            empty = False
            yield document
    if empty:
        what = f"the {len(files)} .txt files in it hold no text" if path.is_dir() else "it is empty"
        raise UserError(f"{path}: {what}; data.path names text to train on")


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, line ends kept as they are."""
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start} ({error.reason}); convert the file to UTF-8 or leave it out"
        ) from error


# ---------------------------------------------------------------- the standard library

STDLIB_SUFFIXES = (".py", ".txt", ".rst")
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"}


def read_stdlib(cache: Path) -> Iterator[Document]:
    """The running interpreter's own sources and texts, without tests: no network, about 10 MB.

    Only pure ASCII files, so that a character vocabulary stays below 100: the few others would
    bring hundreds of characters that occur once.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in _stdlib(root)):
        content = file.read_bytes() if file.is_file() else b""
        if content and content.isascii():
            found = True
            yield Document(name, content.decode("ascii"))
    if not found:
        raise UserError(
            f"data.corpus=stdlib: this Python has no library sources in {root} (a zipped or frozen "
            "one?); name a text with --data.path"
        )


def _stdlib(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_LEFT_OUT]  # prunes the walk
        for name in names:
            # _sysconfigdata*.py is written when Python is built: paths of that one machine.
            if name.endswith(STDLIB_SUFFIXES) and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


# ---------------------------------------------------------------- tiny Shakespeare

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394


def read_shakespeare(cache: Path) -> Iterator[Document]:
    """Tiny Shakespeare (1.1 MB), downloaded once into ``cache`` and checked every time."""
    file = cache / "tinyshakespeare.txt"
    content = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        content = _download_shakespeare()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as out:
                out.write(content)
        except OSError as error:
            raise UserError(
                f"{file}: the download cannot be kept: {error.strerror or error}; make room, "
                "or set ALMOSTGPT_CACHE to another folder"
            ) from error
    yield Document(file.name, content.decode("ascii"))


def _download_shakespeare() -> bytes:
    elsewhere = "or name a text of your own with --data.path"
    try:
        with urlopen(SHAKESPEARE_URL, timeout=30) as response:
            content = response.read(SHAKESPEARE_BYTES + 1)
    except OSError as error:  # URLError, timeouts and broken connections are all OSErrors
        raise UserError(
            f"data.corpus=shakespeare: {SHAKESPEARE_URL} could not be downloaded ({error}); "
            f"connect to the network, {elsewhere}"
        ) from error
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(
            f"data.corpus=shakespeare: what {SHAKESPEARE_URL} sent is not the expected text (its "
            f"SHA-256 differs); try again, {elsewhere}"
        )
    return content


CORPORA: dict[str, Callable[[Path], Iterator[Document]]] = {
    "stdlib": read_stdlib,
    "shakespeare": read_shakespeare,
}
