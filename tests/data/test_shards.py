"""The shard format, byte for byte, and every way a file can be wrong."""

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt.data.shards import Shard, TokenRun, open_shard, write_shard
from almostgpt.errors import UserError


def by_hand(version: int, tokens: list[int], magic: int = 20240520, count: int | None = None):
    """A shard made by ``struct`` from the format's definition."""
    count = len(tokens) if count is None else count
    header = struct.pack("<256i", magic, version, count, *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}{'H' if version == 1 else 'I'}", *tokens)


def read(run: TokenRun, position: int, count: int) -> list[int]:
    room = np.zeros(count + 2, run.dtype)
    run.read([(1, position, count)] if count else [], room)
    assert room[0] == room[-1] == 0
    return room[1:-1].tolist()


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
    lazy = Shard(file)
    assert np.array_equal(lazy, shard) and lazy[1:].tolist() == [0, 50256] and len(lazy) == 3
    assert (lazy.dtype, lazy.nbytes, lazy.filename) == (dtype, shard.nbytes, str(file))
    assert 50256 in lazy and 7 not in lazy
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(lazy)[0] = 1


def test_llama_3_shards_of_llm_c_open(tmp_path):
    file = tmp_path / "tiny_shakespeare_train.bin"
    file.write_bytes(by_hand(7, [128_000, 5], magic=20240801))
    assert open_shard(file).tolist() == [128_000, 5]


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
        (by_hand(1, [1, 2, 3], magic=20240802), "not a token shard: it begins with 20240802"),
        (by_hand(1, [1, 2, 3], magic=20240801), "version 1; known are 7"),
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
    for opening in (open_shard, Shard):
        with pytest.raises(UserError, match=rf"wrong\.bin: .*{reason}"):
            opening(file)


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


# ---------------------------------------------------------------- arbitrary bytes


@st.composite
def almost_shards(draw) -> bytes:
    """Anything at all, or a shard of which something is another value."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=1500))
    number = st.sampled_from([0, 1, 2, 3, 7, 20240520, 20240801, -1, 2**31 - 1]) | st.integers(
        -(2**31), 2**31 - 1
    )
    start = [draw(st.sampled_from([20240520, 20240801]) | number), draw(number), draw(number)]
    return struct.pack("<256i", *start, *[0] * 253) + draw(st.binary(max_size=20))


@settings(max_examples=300, deadline=None)
@given(almost_shards())
def test_arbitrary_bytes_are_a_shard_by_the_definition_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "arbitrary.bin"
    file.write_bytes(content)
    magic, version, count = struct.unpack("<3i", content[:12].ljust(12, b"\0"))
    width = {(20240520, 1): 2, (20240520, 2): 4, (20240801, 7): 4}.get((magic, version))
    if width and len(content) >= 1024 and count >= 0 and len(content) == 1024 + width * count:
        kind = "H" if width == 2 else "I"
        expected = list(struct.unpack(f"<{count}{kind}", content[1024:]))
        assert open_shard(file).tolist() == np.asarray(Shard(file)).tolist() == expected
        assert read(TokenRun([Shard(file)]), 0, count) == expected
    else:
        for opening in (open_shard, Shard):
            with pytest.raises(UserError, match=r"arbitrary\.bin: "):
                opening(file)


# ---------------------------------------------------------------- runs of shards


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), max_size=8), max_size=8), st.data())
def test_a_run_is_its_shards_joined(tmp_path_factory, parts, data):
    """Of files and arrays, narrow and wide, empty ones among them."""
    folder, shards = tmp_path_factory.mktemp("run"), []
    for number, part in enumerate(parts):
        tokens = np.array(part, data.draw(st.sampled_from([np.uint16, np.uint32])))
        file = folder / f"{number}.bin"
        write_shard(file, tokens)
        shards.append(data.draw(st.sampled_from([Shard(file), open_shard(file), tokens])))
    run, joined = TokenRun(shards), sum(parts, [])
    assert len(run) == len(joined)
    first = data.draw(st.integers(0, len(joined)))
    count = data.draw(st.integers(0, len(joined) - first))
    assert read(run, first, count) == joined[first : first + count]
    token = data.draw(st.sampled_from([*joined, 5, 100_000]))
    assert run.find(token).tolist() == [i for i, t in enumerate(joined) if t == token]
    if first < len(joined):
        shard = next(i for i in range(len(parts)) if sum(map(len, parts[: i + 1])) > first)
        assert run.name_at(first) in (str(folder / f"{shard}.bin"), f"shard {shard}")


def test_only_so_many_files_are_open(tmp_path, monkeypatch):
    """More shards than a process may hold open."""
    monkeypatch.setattr("almostgpt.data.shards.OPEN_AT_MOST", 10)
    for number in range(50):
        write_shard(tmp_path / f"{number:02}.bin", np.array([number], np.uint16))
    run = TokenRun([Shard(file) for file in sorted(tmp_path.iterdir())])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert read(run, 0, 50) == list(range(50))
        assert len(os.listdir("/proc/self/fd")) <= before + 10


def test_opening_maps_nothing(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([1, 2], np.uint16))
    before = Path("/proc/self/maps").read_text().count("a.bin")
    run = TokenRun([Shard(tmp_path / "a.bin")])
    assert Path("/proc/self/maps").read_text().count("a.bin") == before == 0
    read(run, 0, 1)
    assert Path("/proc/self/maps").read_text().count("a.bin") == 1


@pytest.mark.parametrize("left", [0, 1024, 1025, 1024 + 2 * 9_999])
def test_a_file_that_shrinks_is_named_and_kills_nobody(tmp_path, left):
    """To read what is gone from a map is a bus error."""
    file = tmp_path / "shrinking.bin"
    write_shard(file, np.arange(10_000, dtype=np.uint16))
    run, unread = TokenRun([Shard(file)]), TokenRun([Shard(file)])
    read(run, 0, 5)
    os.truncate(file, left)
    for other in (run, unread):
        with pytest.raises(UserError, match=r"shrinking\.bin: .*(truncated|cannot be read)"):
            read(other, 9_000, 5)


def test_a_file_that_goes_before_it_is_read_is_named(tmp_path):
    file = tmp_path / "going.bin"
    write_shard(file, np.arange(10, dtype=np.uint16))
    run, opened = TokenRun([Shard(file)]), TokenRun([Shard(file)])
    read(opened, 0, 5)
    file.unlink()
    with pytest.raises(UserError, match=r"going\.bin: .*No such file"):
        read(run, 0, 5)
    assert read(opened, 0, 3) == [0, 1, 2]  # it lives as long as it is mapped
