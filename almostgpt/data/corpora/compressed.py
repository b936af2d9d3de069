"""Files as they are or compressed (gz, bz2, xz, zst), read as a stream that never ends too early."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from almostgpt.errors import UserError

CHUNK = 1 << 16  # compressed bytes taken at a time


class Opened:
    """A file to read from."""

    def __init__(self, stream: BinaryIO, raw: BinaryIO):
        self.stream = stream  # the content, unpacked
        self._raw = raw

    def position(self) -> int:
        """How many bytes of the file itself have been read."""
        return self._raw.tell()


@contextmanager
def opened(file: Path) -> Iterator[Opened]:
    """Opens ``file``, unpacked by its suffix.

    Raises ``UserError`` for a file that cannot be read; while it is read, what
    :data:`DAMAGE` lists, which :func:`damaged` puts into words.
    """
    unpack = COMPRESSIONS.get(file.suffix.lower())
    try:
        raw = open(file, "rb")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    with raw:
        stream = raw if unpack is None else io.BufferedReader(unpack(raw), CHUNK)
        yield Opened(stream, raw)


def damaged(file: Path | str, error: Exception, after: str = "") -> UserError:
    """The message for a file that could not be read to its end."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(
        f"{file}: damaged, truncated or vanished{after}: {reason}; bring the whole file back or "
        "leave it out"
    )


class _Zstandard(io.RawIOBase):
    """Frame after frame of a .zst file; ``EOFError`` if it ends within one.

    zstandard's own stream reader takes a truncated file for a short one.
    """

    def __init__(self, raw: BinaryIO):
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"{raw.name}: .zst files need zstandard: pip install 'almostgpt[data]'"
            ) from error
        self._raw, self._rest, self._pending = raw, b"", b""
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._error, self._frame = zstandard.ZstdError, None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._pending:
            packed = self._rest or self._raw.read(CHUNK)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a compressed frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._pending = self._frame.decompress(packed)
            except self._error as error:
                raise EOFError(str(error)) from error
            self._rest = b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._pending))
        buffer[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size


COMPRESSIONS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _Zstandard,
}
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
