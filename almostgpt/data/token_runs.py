"""A long run of tokens on its way into shards of fixed size, which a kill cannot damage.

The shards are written in place, one after the other. :meth:`RunWriter.state` says how far the run is on
the disk; :meth:`RunWriter.restore` cuts off whatever came after that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from almostgpt.data.shards import DTYPES, HEADER_BYTES, format_of, header_of
from almostgpt.errors import UserError
from almostgpt.files import CHUNK, sha256_of


class RunWriter:
    """Shards ``NAME_000000.bin`` … in ``folder``, of ``shard_tokens`` tokens but the last."""

    def __init__(self, folder: Path, name: str, shard_tokens: int, dtype: np.dtype):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.format = format_of(dtype)
        self.dtype = DTYPES[self.format]
        self.shards: list[dict[str, Any]] = []  # tokens and sha256 of the finished ones
        self._open = None  # the file of the one that is being written
        self._length = 0  # its tokens

    @property
    def tokens(self) -> int:
        """How many were appended."""
        return sum(shard["tokens"] for shard in self.shards) + self._length

    def file(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{self.name}_{number:06d}.bin"

    def append(self, tokens: np.ndarray) -> None:
        """Writes tokens, shape (n,), at the end. Raises ``OSError`` as the file system does."""
        tokens = np.ascontiguousarray(tokens, self.dtype)
        while len(tokens):
            if self._open is None:
                self._open = open(self.file(len(self.shards)), "wb")
                # Nearly every shard will be full: only the last one's count is written again.
                self._open.write(header_of(self.format, self.shard_tokens))
            part = tokens[: self.shard_tokens - self._length]
            self._open.write(part.view(np.uint8))
            self._length += len(part)
            tokens = tokens[len(part) :]
            if self._length == self.shard_tokens:
                self._finish_shard()

    def finish(self) -> None:
        """Completes the last shard."""
        if self._length:
            self._open.seek(0)
            self._open.write(header_of(self.format, self._length))
            self._finish_shard()

    def _finish_shard(self) -> None:
        self._to_disk()
        self._open.close()
        self._open = None
        digest = sha256_of(self.file(len(self.shards)))
        self.shards.append({"tokens": self._length, "sha256": digest})
        self._length = 0

    def _to_disk(self) -> None:
        self._open.flush()
        os.fsync(self._open.fileno())

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, JSON values; all of it is on the disk when this returns."""
        if self._open is not None:
            self._to_disk()
        return {"shards": list(self.shards), "length": self._length}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state. Raises ``UserError`` if what it speaks of is not there any more."""
        self.shards, self._length = list(state["shards"]), state["length"]
        sizes = [shard["tokens"] for shard in self.shards]
        for number, tokens in enumerate(sizes):
            file = self.file(number)
            if not file.is_file() or file.stat().st_size != self._bytes(tokens):
                raise UserError(f"{file}: a finished shard, but damaged or missing")
        file = self.file(len(self.shards))
        if self._length:
            if not file.is_file() or file.stat().st_size < self._bytes(self._length):
                raise UserError(f"{file}: damaged or missing")
            self._open = open(file, "r+b")
            self._open.truncate(self._bytes(self._length))
            self._open.seek(0, os.SEEK_END)
        else:
            file.unlink(missing_ok=True)
        for later in self.folder.glob(f"{self.name}_*.bin"):
            if later.name > file.name:
                later.unlink()

    def _bytes(self, tokens: int) -> int:
        return HEADER_BYTES + tokens * self.dtype.itemsize

    def close(self) -> None:
        """Lets go of the open file, whose shard is not finished."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def read(self, start: int, end: int) -> Iterable[np.ndarray]:
        """The tokens from ``start`` to ``end`` of a finished run, in pieces of up to a million."""
        while start < end:
            number, offset = divmod(start, self.shard_tokens)
            size = min(end - start, self.shard_tokens - offset, CHUNK)
            at = self._bytes(offset)
            yield np.fromfile(self.file(number), self.dtype, size, offset=at)
            start += size
