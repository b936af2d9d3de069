"""The shard format, byte for byte, and every way a file can be wrong."""

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt.data.shards import open_shard, write_shard
from almostgpt.errors import UserError


def by_hand(version: int, tokens: list[int], magic: int = 20240520, count: int | None = None):
    """A shard made by ``struct`` from the format's definition."""
    count = len(tokens) if count is None else count
    header = struct.pack("<256i", magic, version, count, *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}{'H' if version == 1 else 'I'}", *tokens)


@pytest.mark.parametrize(
    ("version", "dtype", "tokens"),
    [
        (1, np.uint16, [0, 1, 50256, 65535]),
        (2, np.uint32, [0, 65536, 2**32 - 1]),
        (1, np.uint16, []),
    ],
)
def test_bytes_are_the_formats(version, dtype, tokens, tmp_path):
    file = tmp_path / "a.bin"
    write_shard(file, np.array(tokens, dtype))
    assert file.read_bytes() == by_hand(version, tokens)
    assert [f.name for f in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(("version", "dtype"), [(1, np.uint16), (2, np.uint32)])
def test_hand_made_file_opens(version, dtype, tmp_path):
    file = tmp_path / "fineweb_train_000001.bin"
    file.write_bytes(by_hand(version, [5, 0, 50256]))
    shard = open_shard(file)
    assert shard.dtype == dtype and shard.tolist() == [5, 0, 50256]
    assert shard.filename == str(file) or shard.filename == file
    with pytest.raises(ValueError, match="read-only"):
        shard[0] = 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 65535), max_size=300))
def test_round_trip(tmp_path_factory, tokens):
    file = tmp_path_factory.getbasetemp() / "round_trip.bin"
    write_shard(file, np.array(tokens, np.uint16))
    assert open_shard(file).tolist() == tokens


def test_pieces_join_exactly(tmp_path):
    tokens = (np.arange(2_500_001) * 48271 % 65536).astype(np.uint16)  # more than two pieces
    digest = write_shard(tmp_path / "a.bin", tokens)
    assert np.array_equal(open_shard(tmp_path / "a.bin"), tokens)
    assert digest == hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest()


WHOLE = by_hand(1, [1, 2, 3])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "too few for its header"),
        (WHOLE[:1023], "too few for its header"),
        (np.arange(3000, dtype="<u2").tobytes(), "not a token shard: it begins with"),
        (by_hand(1, [1, 2, 3], magic=20240801), "not a token shard: it begins with 20240801"),
        (by_hand(7, [1, 2, 3]), "version 7"),
        (WHOLE[:-1], "truncated: 1029 bytes instead of 1030 for 3 tokens"),
        (WHOLE + b"\x00", "longer than its header says"),
        (by_hand(1, [1, 2, 3], count=4), "truncated"),
        (by_hand(1, [1, 2, 3], count=-1), "-1 tokens"),
    ],
)
def test_wrong_file_is_refused_by_name(content, reason, tmp_path):
    file = tmp_path / "wrong.bin"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"wrong\.bin: .*{reason}"):
        open_shard(file)


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"gone\.bin: .*No such file"):
        open_shard(tmp_path / "gone.bin")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.bin"
    write_shard(file, np.array([1], np.uint16))
    before = file.read_bytes()

    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_shard(file, np.array([2, 3], np.uint16))
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["a.bin"]
