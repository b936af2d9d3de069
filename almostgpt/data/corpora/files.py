"""The files that a path means: one file, a folder of them, or a pattern."""

from __future__ import annotations

import glob
import os
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from almostgpt.data.corpora.base import Corpus, not_utf8
from almostgpt.data.corpora.compressed import COMPRESSIONS
from almostgpt.data.corpora.tables import SUFFIXES
from almostgpt.errors import UserError
from almostgpt.files import expand


class Found(NamedTuple):
    """A file to read."""

    name: str  # below the folder or pattern that was given: the same on every machine
    path: Path
    format: str
    size: int  # bytes, as it lies there


def find_files(path: str, corpus: Corpus) -> list[Found]:
    """What ``path`` names, in the order of the names.

    A file is read whatever its suffix, as text if that says nothing. Of a folder, files are taken
    whose name says what they are, at any depth; they must be of one kind. A pattern has ``*``, ``?`` or
    ``[…]``, and ``**`` for folders at any depth.
    """
    given = expand(path)
    if given.is_dir():
        return _of_folder(given, corpus)
    if given.exists():
        return [_found(given.name, given, _format(given, corpus) or "text")]
    if glob.has_magic(str(given)):
        fixed = _fixed_part(given)
        matches = [Path(match) for match in glob.glob(str(given), recursive=True)]
        files = sorted((m.relative_to(fixed).as_posix(), m) for m in matches if m.is_file())
        if not files:
            raise UserError(
                f"{path}: no file matches this pattern; data.path names text to train on"
            )
        return [_found(name, file, _format(file, corpus) or "text") for name, file in files]
    raise UserError(f"{path}: no such file or folder; data.path names text to train on")


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, line ends kept as they are."""
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: {not_utf8(error)}") from error


def _of_folder(folder: Path, corpus: Corpus) -> list[Found]:
    files = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    found = []
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        format = _format(file, corpus)
        if format is not None and file.is_file():
            found.append(_found(name, file, format))
    kinds = Counter(file.format for file in found)
    if not found:
        known = " ".join([*SUFFIXES, *corpus.formats])
        raise UserError(
            f"{folder}: none of the files in it says by its name that it is text ({known}, each also "
            f"with {' '.join(COMPRESSIONS)}); name files by a pattern, such as '{folder}/**/*.md'"
        )
    if len(kinds) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise UserError(
            f"{folder}: it holds files of several kinds ({counts}), perhaps the same text twice; name "
            f"one by a pattern, such as '{folder}/**/*{Path(_stem(found[0].path)).suffix}'"
        )
    return found


def _found(name: str, path: Path, format: str) -> Found:
    try:
        return Found(name, path, format, path.stat().st_size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _format(file: Path, corpus: Corpus) -> str | None:
    """What the name of a file says about it, without the suffix of its compression."""
    name = _stem(file)
    for pattern, format in corpus.formats.items():
        if fnmatchcase(name, pattern):
            return format
    return SUFFIXES.get(Path(name).suffix.lower())


def _stem(file: Path) -> str:
    return file.stem if file.suffix.lower() in COMPRESSIONS else file.name


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first part with a wildcard."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first]) if first else Path(os.curdir)
