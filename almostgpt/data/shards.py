"""A shard: one file with a run of tokens, in the ``.bin`` layout of llm.c and modded-nanogpt.

    256 little-endian int32: magic, version, number of tokens, 253 zeros
    the tokens, little-endian: of the type that magic and version say, see DTYPES

Public pre-tokenized sets in this layout therefore open as they are.
"""

from __future__ import annotations

import hashlib
import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from almostgpt.errors import UserError
from almostgpt.files import CHUNK, replacing

MAGIC = 20240520
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
DTYPES = {  # (magic, version) -> type of a token
    (MAGIC, 1): np.dtype("<u2"),  # llm.c and modded-nanogpt with GPT-2's tokens, and ours
    (MAGIC, 2): np.dtype("<u4"),  # ours, for vocabularies beyond 65,536
    (20240801, 7): np.dtype("<u4"),  # llm.c with Llama 3's tokens
}
MAX_TOKENS = 2**31 - 1  # the count is an int32
Piece = tuple[int, int, int]  # (place where it goes, position in the run, number of tokens)
OPEN_AT_MOST = 256  # maps of a TokenRun: each holds a file open, of which 1024 is the usual limit


def format_of(dtype: np.dtype) -> tuple[int, int]:
    """(magic, version) of the shards that we write of such tokens: the first that there is."""
    return next(key for key, kind in DTYPES.items() if kind == np.dtype(dtype).newbyteorder("<"))


def header_of(format: tuple[int, int], count: int) -> bytes:
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = *format, count
    return header.tobytes()


def write_shard(path: str | Path, tokens: np.ndarray) -> str:
    """Writes ``tokens`` (uint16 or uint32, shape (n,)) to ``path``, whole or not at all.

    Returns the SHA-256 of the file in hexadecimal. Raises ``OSError`` as the file system does.
    """
    format = format_of(tokens.dtype)
    if len(tokens) > MAX_TOKENS:
        raise UserError(f"{path}: a shard holds at most {MAX_TOKENS} tokens, not {len(tokens)}")
    header = header_of(format, len(tokens))
    digest = hashlib.sha256(header)
    with replacing(Path(path)) as file:
        file.write(header)
        for start in range(0, len(tokens), CHUNK):
            piece = tokens[start : start + CHUNK].astype(DTYPES[format]).tobytes()
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


class Shard(Sequence):
    """The tokens of a shard file, whose header is read now and which is mapped when it is used.

    Wherever numpy takes an array it takes a shard: uint16 or uint32, shape (n,), read-only.

    Raises ``UserError`` that names the file for one that is missing, foreign, of another version,
    truncated or too long. Token values are not looked at here: the loader checks each batch.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.dtype, self._count = _read_header(self.path)

    @property
    def filename(self) -> str:
        """The path, under the name that a ``numpy.memmap`` has it by."""
        return str(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens; the file has ``HEADER_BYTES`` more."""
        return self._count * self.dtype.itemsize

    def map(self) -> tuple[np.ndarray, mmap.mmap]:
        """The tokens, (n,), and the map of the whole file that they are in; it is closed with them.

        Raises ``UserError`` that names a file which is missing, or shorter than it was.
        """
        try:
            with open(self.path, "rb") as file:
                whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: it is empty now
            raise _unreadable(self.path, error) from error
        self.check(whole)
        return np.frombuffer(whole, self.dtype, self._count, HEADER_BYTES), whole

    def check(self, whole: mmap.mmap) -> None:
        """Raises ``UserError`` if the file got shorter: to read what is gone would kill the process."""
        size = whole.size()
        if size < HEADER_BYTES + self.nbytes:
            raise UserError(
                f"{self.path}: truncated while it was in use: {size} bytes are left of "
                f"{HEADER_BYTES + self.nbytes}; bring the file back, then go on with --resume"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key):
        return self.map()[0][key]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        tokens = self.map()[0]
        return tokens if dtype in (None, tokens.dtype) and not copy else tokens.astype(dtype)


def open_shard(path: str | Path) -> np.memmap:
    """The tokens of a shard, mapped read-only now: uint16 or uint32, shape (n,), ``.filename`` is set.

    Raises ``UserError`` as :class:`Shard` does.
    """
    dtype, count = _read_header(Path(path))
    return np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(count,))


class TokenRun:
    """Shards laid end to end: one run of tokens, in which a position is an int from 0 on.

    Args:
        shards: of type :class:`Shard`, or integer arrays of shape (n,).
    """

    def __init__(self, shards: Sequence[Shard | np.ndarray]):
        self.shards = list(shards)
        self.lengths = [len(shard) for shard in self.shards]
        self.starts = np.cumsum([0, *self.lengths]).tolist()  # of each shard, and the end
        types = {shard.dtype for shard in self.shards}
        self.dtype = np.result_type(*types) if types else np.dtype(np.uint16)
        self._uniform = len(types) == 1
        self._open: dict[int, tuple[np.ndarray, mmap.mmap | None]] = {}  # shard number -> its map

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, pieces: Iterable[Piece], room: np.ndarray) -> None:
        """Copies each piece, of at least one token, to its place in ``room``: (n,), of any wide type.

        Raises ``UserError`` that names the file which is gone or got shorter: each that is read from
        is looked at first.
        """
        # Views of memory are cut and copied in a third of the time that arrays take, if types agree.
        view = memoryview if self._uniform and room.dtype == self.dtype else np.asarray
        target, starts, opened = view(room), self.starts, {}
        for place, position, length in pieces:
            number = bisect_right(starts, position) - 1
            if number not in opened:
                opened[number] = view(self._tokens(number))
            tokens, first, end = opened[number], position - starts[number], place + length
            if first + length <= len(tokens):
                target[place:end] = tokens[first : first + length]
            else:  # it goes on in the next shard
                head = len(tokens) - first
                target[place : place + head] = tokens[first:]
                self.read([(place + head, position + head, length - head)], room)

    def find(
        self, token: int, advance: Callable[[int], object] = lambda tokens: None
    ) -> np.ndarray:
        """The positions of ``token``, int64, ascending; ``advance(tokens)`` follows the reading."""
        found = []
        for number in range(len(self.shards)):
            tokens, start = self._tokens(number), self.starts[number]
            for first in range(0, len(tokens), CHUNK):
                places = np.flatnonzero(tokens[first : first + CHUNK] == token)
                found.append(places + (start + first))
                advance(min(CHUNK, len(tokens) - first))
        return np.concatenate([np.zeros(0, np.int64), *found])

    def name_at(self, position: int) -> str:
        """The file, or the number of the shard, that holds the token at ``position``."""
        number = bisect_right(self.starts, position) - 1
        return str(getattr(self.shards[number], "filename", f"shard {number}"))

    def _tokens(self, number: int) -> np.ndarray:
        """A shard's tokens, mapped if they are not; ``UserError`` if the file got shorter."""
        shard = self.shards[number]
        if number not in self._open:
            if len(self._open) >= OPEN_AT_MOST:
                del self._open[next(iter(self._open))]
            is_file = isinstance(shard, Shard)
            self._open[number] = shard.map() if is_file else (np.asarray(shard), None)
        tokens, whole = self._open[number]
        if whole is not None:
            shard.check(whole)
        return tokens


def _read_header(path: Path) -> tuple[np.dtype, int]:
    """Type and number of the tokens in a shard file."""
    try:
        with open(path, "rb") as file:
            header_bytes = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(header_bytes) < HEADER_BYTES:
        raise UserError(f"{path}: not a token shard: {size} bytes are too few for its header")
    magic, version, count = np.frombuffer(header_bytes, "<i4")[:3].tolist()
    known = [v for m, v in DTYPES if m == magic]
    if not known:
        raise UserError(
            f"{path}: not a token shard: it begins with {magic}, not {MAGIC} (a .bin file without "
            "the llm.c header? prepare the text again with almostgpt prepare)"
        )
    if version not in known:
        versions = " and ".join(map(str, known))
        raise UserError(f"{path}: a token shard of version {version}; known are {versions}")
    dtype = DTYPES[magic, version]
    expected = HEADER_BYTES + count * dtype.itemsize
    if count < 0 or size != expected:
        reason = "truncated" if size < expected else "longer than its header says"
        raise UserError(
            f"{path}: damaged, {reason}: {size} bytes instead of {expected} for {count} tokens"
        )
    return dtype, count


def _unreadable(path: Path, error: OSError | ValueError) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path}: the token shard cannot be read: {reason}")
