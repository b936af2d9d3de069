"""What may go wrong while data is prepared: nothing half-made is ever taken for whole."""

import errno
import threading

import numpy as np
import pytest

from almostgpt.config import DataConfig
from almostgpt.data import prepare as preparation
from almostgpt.data.dataset import open_dataset
from almostgpt.data.prepare import cached_dataset, prepare
from almostgpt.data.tokenizer import ByteTokenizer
from almostgpt.errors import UserError


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def joined(shards):
    return np.concatenate([np.asarray(shard) for shard in shards]).tolist()


def test_two_writers_at_once_agree(text_file, tmp_path, monkeypatch):
    """Both looked into the empty cache and do all the work: the first one's folder stays."""
    data, cache = DataConfig(path=str(text_file)), tmp_path / "cache"
    barrier, results = threading.Barrier(2, timeout=20), []
    write_manifest = preparation._write_manifest

    def together(*args):
        barrier.wait()
        write_manifest(*args)

    monkeypatch.setattr(preparation, "_write_manifest", together)
    threads = [
        threading.Thread(target=lambda: results.append(cached_dataset(data, cache, False)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and results[0].folder == results[1].folder
    assert joined(results[0].train) == joined(results[1].train)
    assert list((cache / "datasets").iterdir()) == [results[0].folder]


def test_output_in_use_is_left_alone(text_file, tmp_path):
    data, out = DataConfig(path=str(text_file)), tmp_path / "out"
    out.mkdir()
    prepare(data, out, progress=False)  # an empty folder is fine
    before = contents(out)
    with pytest.raises(UserError, match="out: already exists"):
        prepare(data, out, progress=False)
    assert contents(out) == before


class FullDisk:
    """Stands for ``open``: files that take ``room`` bytes in all, then no more."""

    def __init__(self, room):
        self.room = room

    def __call__(self, path, mode="r", *args, **kwargs):
        file = open(path, mode, *args, **kwargs)
        if "w" not in mode:
            return file
        disk, write = self, file.write

        class Writer:
            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(self, content):
                disk.room -= len(content)
                if disk.room < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(content)

        return Writer()


def test_full_disk_is_one_message_and_leaves_nothing(text_file, tmp_path, monkeypatch):
    data, cache = DataConfig(path=str(text_file), shard_tokens=400), tmp_path / "cache"
    reached, room = set(), 0
    while True:  # the disk is full after 0, 700, 1400 ... bytes: in spool, shards, json
        disk = FullDisk(room)
        monkeypatch.setattr(preparation, "open", disk, raising=False)
        monkeypatch.setattr("almostgpt.files.open", disk, raising=False)
        try:
            cached_dataset(data, cache, progress=False)
            break
        except UserError as error:
            assert "No space left on device" in str(error) and "Make room" in str(error)
            reached.add(room)
        assert list((cache / "datasets").iterdir()) == []
        room += 700
    assert len(reached) > 5
    assert disk.room >= 0


def test_interruption_leaves_nothing(text_file, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "_write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(DataConfig(path=str(text_file)), tmp_path / "out", progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["poem.txt"]


def test_leftovers_of_a_killed_run_are_not_opened(text_file, poem, tmp_path, monkeypatch):
    data, cache = DataConfig(path=str(text_file)), tmp_path / "cache"
    monkeypatch.setattr(preparation.shutil, "rmtree", lambda *args, **kwargs: None)
    monkeypatch.setattr(preparation, "_write_manifest", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # as if killed: nothing is cleaned up
        cached_dataset(data, cache, progress=False)
    monkeypatch.undo()
    assert len(list((cache / "datasets").iterdir())) == 1
    dataset = cached_dataset(data, cache, progress=False)
    assert dataset.tokenizer.decode(joined(dataset.train)) == poem[: len(poem) * 9 // 10]
    assert list((cache / "datasets").iterdir()) == [dataset.folder]  # and cleared away at last


def test_unusable_cache(text_file, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match="ALMOSTGPT_CACHE"):
        cached_dataset(DataConfig(path=str(text_file)), tmp_path / "cache", progress=False)


def test_too_large_shards(text_file, tmp_path):
    data = DataConfig(path=str(text_file), shard_tokens=2**31)
    with pytest.raises(UserError, match="data.shard_tokens"):
        prepare(data, tmp_path / "out", progress=False)


def test_progress_is_plain_lines_on_stderr(text_file, tmp_path, capsys):
    data = DataConfig(path=str(text_file), tokenizer="byte")
    prepare(data, tmp_path / "out", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()] == ["preparing", "prepared"]
    prepare(data, tmp_path / "quiet", progress=False)
    assert capsys.readouterr() == ("", "")
    assert open_dataset(tmp_path / "quiet").vocab_size == ByteTokenizer.vocab_size
