"""A shard: one file with a run of tokens, in the ``.bin`` layout of llm.c and modded-nanogpt.

    256 little-endian int32: 20240520, version, number of tokens, 253 zeros
    the tokens, little-endian: uint16 in version 1 (theirs), uint32 in version 2 (ours)

Public pre-tokenized sets in this layout therefore open as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from almostgpt.errors import UserError
from almostgpt.files import CHUNK, replacing

MAGIC = 20240520
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
DTYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}  # version -> type of a token
MAX_TOKENS = 2**31 - 1  # the count is an int32


def write_shard(path: str | Path, tokens: np.ndarray) -> str:
    """Writes ``tokens`` (uint16 or uint32, shape (n,)) to ``path``, whole or not at all.

    Returns the SHA-256 of the file in hexadecimal. Raises ``OSError`` as the file system does.
    """
    versions = {np.dtype(np.uint16): 1, np.dtype(np.uint32): 2}
    version = versions[tokens.dtype.newbyteorder("=")]
    if len(tokens) > MAX_TOKENS:
        raise UserError(f"{path}: a shard holds at most {MAX_TOKENS} tokens, not {len(tokens)}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, version, len(tokens)
    digest = hashlib.sha256(header.tobytes())
    with replacing(Path(path)) as file:
        file.write(header.tobytes())
        for start in range(0, len(tokens), CHUNK):
            piece = tokens[start : start + CHUNK].astype(DTYPES[version]).tobytes()
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def open_shard(path: str | Path) -> np.memmap:
    """The tokens of a shard, mapped read-only: uint16 or uint32, shape (n,), ``.filename`` is set.

    Raises ``UserError`` that names the file for one that is missing, foreign, of another version,
    truncated or too long. Token values are not looked at here: the loader checks each batch.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            header_bytes = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: the token shard cannot be read: {error.strerror}") from error
    if len(header_bytes) < HEADER_BYTES:
        raise UserError(f"{path}: not a token shard: {size} bytes are too few for its header")
    magic, version, count = np.frombuffer(header_bytes, "<i4")[:3].tolist()
    if magic != MAGIC:
        raise UserError(
            f"{path}: not a token shard: it begins with {magic}, not {MAGIC} (a .bin file without "
            "the llm.c header? prepare the text again with almostgpt prepare)"
        )
    if version not in DTYPES:
        raise UserError(f"{path}: a token shard of version {version}; known are 1 and 2")
    expected = HEADER_BYTES + count * DTYPES[version].itemsize
    if count < 0 or size != expected:
        reason = "truncated" if size < expected else "longer than its header says"
        raise UserError(
            f"{path}: damaged, {reason}: {size} bytes instead of {expected} for {count} tokens"
        )
    return np.memmap(path, DTYPES[version], mode="r", offset=HEADER_BYTES, shape=(count,))
