"""Files that are either whole or absent, whatever kills the process or fills the disk; and checksums."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 20  # bytes read at a time


def expand(path: str | Path) -> Path:
    """``~`` as the home folder; unlike ``Path.expanduser`` it leaves an unknown user's as it is."""
    return Path(os.path.expanduser(path))


def temporary_beside(path: Path) -> Path:
    """A fresh name in the folder of ``path``, so that a rename to ``path`` is atomic."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")


def temporaries_beside(path: Path) -> list[Path]:
    """Every name that :func:`temporary_beside` gave out for ``path`` and that still exists."""
    start = f".{path.name}."
    names = [other.name for other in path.parent.iterdir()]
    return [path.with_name(n) for n in names if n.startswith(start) and n.endswith(".partial")]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it takes the name ``path`` only once it is complete and on the disk."""
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path, advance: Callable[[int], object] = lambda size: None) -> str:
    """The SHA-256 of a file in hexadecimal, streamed; ``advance(bytes)`` follows the reading."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replaces the content of ``path`` in one step, on the disk when it returns."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def fsync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` (creations and renames) last through a power cut."""
    if os.name != "posix":  # Windows has no handle for a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
